"""`duo eval harness-bench`: the adapter beside lm-eval's own for transformers, the same weights, the same requests.

Each engine is a process of its own. A first call with all requests, which does not count, compiles what they need.
Transformers in float64 may say how far each of the two is off.
"""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from duo_train.data.haystack import load_haystack
from jaxtyping import Float

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import begun, write
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from duo_eval.speed.engines.transformers import torch_model
from duo_eval.tasks import mmlu
from duo_jax import LM, load_model, load_tokenizer
from duo_jax.checkpoint.load import open_source

Pair = tuple[str, str]


@dataclass(frozen=True)
class Run:
    """One engine's work."""

    engine: Literal["duo", "transformers"]
    dtype: Literal["float32", "float64"]
    model: str
    kind: str
    count: int
    batch_size: int
    repeats: int
    seed: int


@dataclass(frozen=True)
class HarnessBench:
    """Compare likelihoods and speed of lm-eval's adapter for transformers and this one; needs the `bench` extra."""

    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id of a Llama model."""
    out: Path = Path("harness-bench.json")
    """File to write."""
    count: int = 34
    """Requests of each kind."""
    kinds: tuple[str, ...] = ("choices", "texts", "letters")
    """Kinds of requests: five-shot MMLU letters; choices of several tokens; contexts of their own, ragged."""
    batch_size: int = 8
    """Most texts computed together, in both."""
    repeats: int = 2
    """Timed calls of each engine; the fastest counts."""
    exact: bool = False
    """Answer with transformers in float64 too, and give each engine's largest distance to that."""
    seed: int = 0
    """Seed of the requests."""

    def run(self) -> None:
        """Measure, compare, write."""
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds or min(self.count, self.batch_size, self.repeats) < 1:
            raise ValueError(f"kinds are {', '.join(KINDS)} and numbers at least 1, got {self}")
        record = begun(self.out, asdict(self))
        for kind in self.kinds:
            shared: dict[str, Any] = {"model": self.model, "kind": kind, "count": self.count, "seed": self.seed}
            shared |= {"batch_size": self.batch_size, "repeats": self.repeats}
            ours, theirs = (_in_own_process(Run(engine, "float32", **shared)) for engine in ("duo", "transformers"))
            mine, other = _logprobs(ours), _logprobs(theirs)
            same = [a[1] == b[1] for a, b in zip(ours["answers"], theirs["answers"], strict=True)]
            result = {
                "kind": kind,
                "requests": len(mine),
                "max_difference": float(np.abs(mine - other).max()),
                "greedy_differs": len(same) - sum(same),
                "seconds": {"duo": min(ours["times"]), "transformers": min(theirs["times"])},
                "times": {"duo": ours["times"], "transformers": theirs["times"]},
                "first_call_seconds": {"duo": ours["first"], "transformers": theirs["first"]},
                "speedup": min(theirs["times"]) / min(ours["times"]),
                # Processes that wanted a core, over the last minute: above this run's own, the machine was shared.
                "load": {"duo": ours["load"], "transformers": theirs["load"]},
            }
            if self.exact:
                exact = _logprobs(_in_own_process(Run("transformers", "float64", **shared | {"repeats": 0})))
                result["errors"] = {
                    "duo": float(np.abs(mine - exact).max()),
                    "transformers": float(np.abs(other - exact).max()),
                }
            record["results"].append(result)
            write(self.out, record)
            print(
                f"{kind}: {len(mine)} requests, largest difference {result['max_difference']:.1e}, "
                f"duo {min(ours['times']):.1f} s, transformers {min(theirs['times']):.1f} s"
            )


def _logprobs(done: dict[str, Any]) -> Float[np.ndarray, "R"]:
    return np.array([logprob for logprob, _ in done["answers"]])


def requests(kind: str, count: int, seed: int) -> list[Pair]:
    """Contexts and continuations of one kind."""
    return KINDS[kind](count, random.Random(seed))[:count]


def _letters(count: int, rng: random.Random) -> list[Pair]:
    asked = mmlu.questions(shots=5, count=-(-count // 4), seed=rng.randrange(1000))
    return [(question.prompt, f" {letter}") for question in asked for letter in mmlu.LETTERS]


def _choices(count: int, rng: random.Random) -> list[Pair]:
    """A context of the haystack with four continuations: its own, and those of other places."""
    text = load_haystack(max_chars=200_000)
    found = []
    for _ in range(-(-count // 4)):
        at, size = rng.randrange(100_000), rng.randrange(200, 800)
        ends = [at + size, *(rng.randrange(150_000) for _ in range(3))]
        found += [
            (text[at : at + size].rstrip(), " " + text[end : end + rng.randrange(20, 80)].strip()) for end in ends
        ]
    return found


def _texts(count: int, rng: random.Random) -> list[Pair]:
    text = load_haystack(max_chars=200_000)
    found = []
    for _ in range(count):
        at, size, more = rng.randrange(150_000), rng.randrange(20, 800), rng.randrange(5, 200)
        found.append((text[at : at + size].rstrip(), " " + text[at + size : at + size + more].strip()))
    return found


KINDS = {"letters": _letters, "choices": _choices, "texts": _texts}


def measure(run: Run) -> dict[str, Any]:
    """Answers and times of one engine, in this process."""
    from lm_eval.api.instance import Instance

    adapter = _adapter(run)
    pairs = requests(run.kind, run.count, run.seed)
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    times = []
    for _ in range(1 + run.repeats):
        begin = time.perf_counter()
        answers = adapter.loglikelihood(asked, disable_tqdm=True)
        times.append(time.perf_counter() - begin)
    return {
        "answers": [[float(one), bool(top)] for one, top in answers],
        "first": times[0],
        "times": times[1:],
        "load": os.getloadavg()[0],
    }


def _adapter(run: Run) -> Any:
    tokenizer = load_tokenizer(run.model)
    if run.engine == "duo":
        from duo_eval.tasks.lm_eval.adapter import DuoLM

        model = load_model(run.model, dtype=run.dtype)
        return DuoLM(LM(model, tokenizer, None), batch_size=run.batch_size, progress=False)
    try:
        import torch
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(
            f"transformers' adapter needs torch and accelerate ({error}): pip install 'duo-jax[bench]'"
        ) from None
    source = open_source(run.model)
    model = torch_model(source.config, source, dtype=run.dtype, device=torch.device("cpu"))
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=run.batch_size, device="cpu")


def _in_own_process(run: Run) -> dict[str, Any]:
    # -P keeps modules of the working directory from being imported.
    command = [sys.executable, "-P", "-m", "duo_eval.speed.adapter", json.dumps(asdict(run))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"the measurement of {run} failed; what it said is above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def adapter_table(path: Path) -> str:
    """Likelihoods and seconds of lm-eval's requests, compared with transformers' own adapter."""
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for result in record["results"]:
        seconds, errors = result["seconds"], result.get("errors", {})
        off = (f"{errors[name]:.1e}" if name in errors else "" for name in ("duo", "transformers"))
        times = (f"{seconds[name]:.1f}" for name in ("duo", "transformers"))
        row = [result["kind"], result["requests"], f"{result['max_difference']:.1e}", *off, *times]
        rows.append([*row, f"{result['speedup']:.1f}"])
    headers = ["requests", "number", "largest difference", "to float64, duo", "to float64, transformers"]
    table = rows_to_table(rows, [*headers, "seconds, duo", "seconds, transformers", "speedup"])
    about = "Differences are in nats of a whole continuation, the largest over the requests. Compilation is left out."
    return f"{table}\n\n{about} {origin([record], record['command'])}"


RESULT = ResultType(
    "lm-eval's adapter compared with transformers'",
    with_fields("max_difference", "speedup"),
    {"Requests": adapter_table},
)


if __name__ == "__main__":
    print(json.dumps(measure(Run(**json.loads(sys.argv[1])))))
