"""`duo eval harness-bench`: this adapter and lm-eval's own for transformers, on the same weights and requests.

Each engine runs in a process of its own. A first call with all requests, which does not count, compiles what they need.
Transformers in float64 can show how far each of the two is off.
"""

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from duo_train.data.haystack import load_haystack

from duo_eval.runner.process import in_fresh_process
from duo_eval.runner.provenance import origin
from duo_eval.runner.record import Record, read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from duo_eval.speed.engines.transformers import torch_model
from duo_eval.tasks import mmlu
from duo_jax import LM, load_model, load_tokenizer
from duo_jax.arguments import whole_number
from duo_jax.certified import inference
from duo_jax.checkpoint.open import open_source
from pallas_kernels.timing import seconds
from pallas_kernels.types import Request

Pair = tuple[str, str]
ENGINES = "duo", "transformers"


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
    """Kinds of requests: five-shot MMLU letters; choices of several tokens; ragged texts, each with its own context."""
    batch_size: int = 8
    """Most texts computed together, in both."""
    repeats: int = 2
    """Timed calls of each engine; the fastest counts."""
    exact: bool = False
    """Answer with transformers in float64 too, and give each engine's largest distance to that."""
    seed: int = 0
    """Seed of the requests."""

    def requests(self) -> list[Request]:
        """The attention of this project's adapter, for certification."""
        return inference(open_source(self.model, weights=False).config.with_dtypes(dtype="float32"), None)

    def run(self) -> None:
        """Measure, compare, write."""
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            raise ValueError(f"--kinds are some of {', '.join(KINDS)}, got {', '.join(self.kinds) or 'none'}")
        for name in ("count", "batch_size", "repeats"):
            whole_number(name, getattr(self, name), 1)
        record = Record.open(self.out, {"task": "harness-bench", **asdict(self)}, again=True)
        with record.writing() as append:
            self._compare(append)

    def _compare(self, append: Callable[[Any, Mapping[str, Any]], None]) -> None:
        for kind in self.kinds:
            answers = {engine: self._answers(engine, kind) for engine in ENGINES}
            logprobs = {engine: np.array(each["logprobs"]) for engine, each in answers.items()}
            is_greedy = [answers[engine]["is_greedy"] for engine in ENGINES]
            times = {engine: each["times"] for engine, each in answers.items()}
            best = {engine: min(each) for engine, each in times.items()}
            result: dict[str, Any] = {
                "kind": kind,
                "requests": len(logprobs["duo"]),
                "max_difference": float(np.abs(logprobs["duo"] - logprobs["transformers"]).max()),
                "greedy_differs": sum(duo != other for duo, other in zip(*is_greedy, strict=True)),
                "seconds": best,
                "times": times,
                "first_call_seconds": {engine: each["first"] for engine, each in answers.items()},
                "speedup": best["transformers"] / best["duo"],
                # Runnable processes over the last minute: if more than this run's own, the machine was shared.
                "load": {engine: each["load"] for engine, each in answers.items()},
            }
            if self.exact:
                exact = np.array(self._answers("transformers", kind, dtype="float64", repeats=0)["logprobs"])
                result["errors"] = {engine: float(np.abs(each - exact).max()) for engine, each in logprobs.items()}
            append(None, result)
            print(
                f"{kind}: {result['requests']} requests, largest difference {result['max_difference']:.1e}, "
                f"duo {best['duo']:.1f} s, transformers {best['transformers']:.1f} s"
            )

    def _answers(self, engine: str, kind: str, **changes: Any) -> dict[str, Any]:
        shared = {"model": self.model, "count": self.count, "batch_size": self.batch_size, "seed": self.seed}
        arguments = shared | {"engine": engine, "kind": kind, "dtype": "float32", "repeats": self.repeats} | changes
        return in_fresh_process("duo_eval.speed.adapter:measure", arguments)


def requests(kind: str, count: int, seed: int) -> list[Pair]:
    """Contexts and continuations of one kind."""
    return KINDS[kind](count, random.Random(seed))[:count]


def _letters(count: int, rng: random.Random) -> list[Pair]:
    questions = mmlu.questions(shots=5, count=-(-count // 4), seed=rng.randrange(1000))
    return [(question.prompt, f" {letter}") for question in questions for letter in mmlu.LETTERS]


def _choices(count: int, rng: random.Random) -> list[Pair]:
    """A context of the haystack with four continuations: its own, and three from elsewhere."""
    text = load_haystack(max_chars=200_000)
    pairs = []
    for _ in range(-(-count // 4)):
        at, size = rng.randrange(100_000), rng.randrange(200, 800)
        ends = [at + size, *(rng.randrange(150_000) for _ in range(3))]
        pairs += [
            (text[at : at + size].rstrip(), " " + text[end : end + rng.randrange(20, 80)].strip()) for end in ends
        ]
    return pairs


def _texts(count: int, rng: random.Random) -> list[Pair]:
    text = load_haystack(max_chars=200_000)
    pairs = []
    for _ in range(count):
        at, size, more = rng.randrange(150_000), rng.randrange(20, 800), rng.randrange(5, 200)
        pairs.append((text[at : at + size].rstrip(), " " + text[at + size : at + size + more].strip()))
    return pairs


KINDS = {"letters": _letters, "choices": _choices, "texts": _texts}


def measure(
    engine: str, dtype: str, model: str, kind: str, count: int, batch_size: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Answers and times of one engine, in this process."""
    from lm_eval.api.instance import Instance

    adapter = _adapter(engine, model, dtype, batch_size)
    pairs = requests(kind, count, seed)
    instances = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    answers: list[Any] = []

    def answer() -> None:
        answers[:] = adapter.loglikelihood(instances, disable_tqdm=True)

    times = [seconds(answer) for _ in range(1 + repeats)]
    return {
        "logprobs": [float(logprob) for logprob, _ in answers],
        "is_greedy": [bool(is_greedy) for _, is_greedy in answers],
        "first": times[0],
        "times": times[1:],
        "load": os.getloadavg()[0],
    }


def _adapter(engine: str, name: str, dtype: str, batch_size: int) -> Any:
    tokenizer = load_tokenizer(name)
    if engine == "duo":
        from duo_eval.tasks.lm_eval.adapter import DuoLM

        return DuoLM(LM(load_model(name, dtype=dtype), tokenizer, None), batch_size=batch_size, progress=False)
    try:
        import torch
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(
            f"transformers' adapter needs torch and accelerate ({error}): pip install 'duo-jax[bench]'"
        ) from None
    source = open_source(name)
    model = torch_model(source.config, source, dtype=dtype, device=torch.device("cpu"))
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")


def adapter_table(path: Path) -> str:
    """Likelihoods and seconds of lm-eval's requests, compared with transformers' own adapter."""
    head, results = read(path)
    rows = []
    for result in results:
        seconds, errors = result["seconds"], result.get("errors", {})
        off = (f"{errors[name]:.1e}" if name in errors else "" for name in ("duo", "transformers"))
        times = (f"{seconds[name]:.1f}" for name in ("duo", "transformers"))
        row = [result["kind"], result["requests"], f"{result['max_difference']:.1e}", *off, *times]
        rows.append([*row, f"{result['speedup']:.1f}"])
    headers = ["requests", "number", "largest difference", "to float64, duo", "to float64, transformers"]
    table = rows_to_table(rows, [*headers, "seconds, duo", "seconds, transformers", "speedup"])
    about = "Differences are in nats of a whole continuation, the largest over the requests. Compilation is left out."
    return f"{table}\n\n{about} {origin(head['runs'], head['runs'][-1]['command'])}"


RESULT = ResultType(
    "lm-eval adapter",
    with_fields("max_difference", "speedup"),
    {"Requests": adapter_table},
)
