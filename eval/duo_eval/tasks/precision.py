"""`duo eval precision`: the cost of fewer bits for cache and weights, by teacher forcing on needles and on prose."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
from duo_train.data.needles import Needles

from duo_eval.runner.provenance import origin
from duo_eval.runner.record import Record, fingerprint, read
from duo_eval.runner.run import Answer, run
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from duo_eval.stats.intervals import Estimate, ratio
from duo_eval.tasks.passkeys import UNSEEN, fit, score_text
from duo_jax import HeadPattern, load_model, load_tokenizer
from duo_jax.certified import inference
from duo_jax.checkpoint.fingerprint import weights_fingerprint
from duo_jax.checkpoint.open import open_config
from duo_jax.model.precision import ALLOWED, check_name
from pallas_kernels.types import Request

FLOAT = "float32"


@dataclass(frozen=True)
class Job:
    """One sample, or stretch of prose, at one precision."""

    weights: str
    cache: str
    sparsity: float
    length: int
    sample: int
    prose: bool


@dataclass(frozen=True)
class Precision:
    """Score hidden passkeys and prose with quantized caches and quantized weights, and compare with float32."""

    out: Path
    """File to append to; results that it already has are not computed again."""
    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id."""
    pattern: str = "smollm2-135m-instruct"
    """Head pattern: a published name or a folder."""
    caches: tuple[str, ...] = ("bfloat16", "int8", "int4")
    """Data types of retrieval heads' keys and values, with float32 weights; float32 is always measured."""
    weights: tuple[str, ...] = ("int8", "w8a8", "int4")
    """Formats of weights, with a float32 cache."""
    both: tuple[str, ...] = ("w8a8:int4",)
    """Pairs WEIGHTS:CACHE."""
    sparsity: tuple[float, ...] = (0.0, 0.5)
    """Fractions of KV heads that stream; 0 is full attention."""
    lengths: tuple[int, ...] = (2048, 4096)
    """Tokens of a sample, and of a stretch of prose."""
    samples: int = 13
    """Samples of each length, with 16 passkeys each."""
    prose: int = 10
    """Stretches of prose of each length."""
    sink_size: int = 64
    """First tokens that streaming heads keep."""
    recent_size: int = 256
    """Most recent tokens that streaming heads keep."""
    data: Needles = UNSEEN

    def requests(self) -> list[Request]:
        """The attention over each type of cache, for certification."""
        config = open_config(self.model).with_dtypes(dtype=FLOAT)
        patterns = [self._pattern(sparsity) for sparsity in self.sparsity]
        caches = sorted({cache for _, cache in self._precisions()})
        return [each for cache in caches for each in inference(config, *patterns, kv_dtype=cache)]

    def run(self) -> None:
        """Score the missing items, one precision after the other."""
        patterns = {sparsity: self._pattern(sparsity) for sparsity in self.sparsity}
        about = {name: getattr(self, name) for name in ("model", "sink_size", "recent_size")}
        about |= {"data": self.data.saved()}
        gates = {"pattern": fingerprint(HeadPattern.load(self.pattern)), "weights": weights_fingerprint(self.model)}
        record = Record.open(self.out, about | {"task": "precision"}, gates)

        def prepare(_: list[Job]) -> tuple[str, Answer[Job]]:
            config, tokenizer = open_config(self.model), load_tokenizer(self.model)
            for pattern in filter(None, patterns.values()):
                pattern.check(config)
            texts = {length: fit(self.data, tokenizer, length) for length in self.lengths}

            def score(jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
                for weights, group in groupby(jobs, lambda job: job.weights):
                    model = load_model(self.model, dtype=FLOAT, weight_dtype=None if weights == FLOAT else weights)
                    for job in group:
                        about: dict[str, Any] = {"prose": job.prose, "kv_dtype": job.cache}
                        text = texts[job.length], job.length, job.sample
                        pattern = patterns[job.sparsity] or HeadPattern.full(model.config)
                        yield job, score_text(model, *text, pattern, **about)

            return FLOAT, score

        run(record, self._jobs(), prepare, unit="sample")

    def _pattern(self, sparsity: float) -> HeadPattern | None:
        sizes = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        return HeadPattern.load(self.pattern, sparsity=sparsity, **sizes) if sparsity else None

    def _precisions(self) -> list[tuple[str, str]]:
        """Weights and cache, every pair to measure.

        Raises:
            ValueError: an unknown one.
        """
        pairs = [(FLOAT, FLOAT), *((FLOAT, cache) for cache in self.caches), *((name, FLOAT) for name in self.weights)]
        for entry in self.both:
            weights, _, cache = entry.partition(":")
            pairs.append((weights, cache))
        for weights, cache in pairs:
            if weights != FLOAT:
                check_name("weights", weights, ALLOWED["weight_dtype"])
            check_name("cache", cache, ALLOWED["kv_dtype"])
        return pairs

    def _jobs(self) -> Iterator[Job]:
        """Short texts first; models of one precision together, since loading takes seconds."""
        for length in self.lengths:
            for (weights, cache), sparsity in product(self._precisions(), self.sparsity):
                for prose, count in ((False, self.samples), (True, self.prose)):
                    yield from (Job(weights, cache, sparsity, length, number, prose) for number in range(count))


def precision_table(path: Path) -> str:
    """Accuracy and likelihood of passkeys, and next-token loss, by paired differences from float32."""
    head, records = read(path)
    found: dict[tuple, dict[int, dict[str, float]]] = defaultdict(dict)
    for record in records:
        job = record["job"]
        key = job["length"], job["sparsity"], job["prose"], job["weights"], job["cache"]
        found[key][job["sample"]] = {name: float(sum(record[name])) for name in ("tokens", "hits", "nll")}
    rows = []
    for length, sparsity, prose, weights, cache in found:
        if prose:
            continue
        needles = found[length, sparsity, False, weights, cache]
        row = [length, f"{sparsity:.0%}", weights, cache, _mean(needles, "hits").scaled(100).format(".1f")]
        row += [_change(found, (length, sparsity, kind), weights, cache) for kind in (False, True)]
        rows.append([*row, len(needles)])
    headers = ["tokens", "stream", "weights", "cache", "passkeys right, %", "NLL of passkeys, more", "of prose, more"]
    note = (
        "Likelihoods: nats a token more than with float32 at the same sparsity on the same samples; in brackets 95 % "
        "intervals over samples. Compare accuracies only between rows of the same samples."
    )
    table = rows_to_table(rows, [*headers, "samples"], "rrllr")
    return f"{table}\n\n{note}\n{origin(head['runs'], 'duo eval precision')}\n"


def _change(found: Mapping[tuple, dict[int, dict[str, float]]], at: tuple, weights: str, cache: str) -> str:
    """How much less likely a token became than with float32, or nothing for float32 itself."""
    of, base = (found.get((*at, *precision), {}) for precision in ((weights, cache), (FLOAT, FLOAT)))
    if (weights, cache) == (FLOAT, FLOAT) or not set(of) & set(base):
        return ""
    return _mean(of, "nll", minus=base).format("+.4f")


def _mean(of: dict[int, dict[str, float]], field: str, minus: dict[int, dict[str, float]] | None = None) -> Estimate:
    """Mean of a field per token, over the samples that both have."""
    shared = sorted(set(of) & set(minus)) if minus is not None else sorted(of)
    totals, counts = (np.array([of[sample][name] for sample in shared]) for name in (field, "tokens"))
    return ratio(totals, counts, np.array([minus[sample][field] for sample in shared]) if minus is not None else None)


RESULT = ResultType("Quantization", of_task("precision"), {"Compared with float32": precision_table}, group="Accuracy")
