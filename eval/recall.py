"""`duo eval recall`: what a pattern costs in recall, by teacher forcing: how likely is each word of a hidden passkey?

Each sample hides many passkeys; all of them are asked for in turn and answered rightly, and every token of an answer is
scored given what stands before it. That uses every token of a small model's answers, where an exact match of whole keys
would use one bit. Text, words and seed are other than those that gates are trained on.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from duo_jax import HeadPattern, KVCache, Model, load_model, load_tokenizer, prefill, score
from eval.ledger import Ledger, fingerprint
from train.needles import NeedleData, Needles, Sample
from train.vocabulary import HELD_OUT

UNSEEN = Needles(
    haystack="essays", vocabulary=HELD_OUT, distinct_words=True, num_passkeys=16, passkey_words=5, seed=20_000
)
FULL, STREAMING, RANDOM = "full attention", "all streaming", "random"


@dataclass(frozen=True)
class Job:
    """One sample under one pattern."""

    method: str
    sparsity: float
    length: int
    sample: int
    prose: bool = False


@dataclass(frozen=True)
class SizedJob(Job):
    """One sample under one pattern with other sizes than the file's own."""

    sink_size: int = 0
    recent_size: int = 0


@dataclass(frozen=True)
class Recall:
    """Score hidden passkeys under full attention, head patterns, random ones, and streaming heads only."""

    patterns: tuple[str, ...] = ("smollm2=smollm2-135m-instruct",)
    """Patterns to compare, each NAME=FOLDER or NAME=PUBLISHED-NAME."""
    out: Path = Path("recall.jsonl")
    """File to append to; what it has already is not computed again."""
    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id."""
    sparsity: tuple[float, ...] = (0.25, 0.5, 0.6, 0.7, 0.75, 0.8)
    """Fractions of KV heads that stream."""
    lengths: tuple[int, ...] = (2048, 4096)
    """Tokens of a sample, all in all."""
    samples: int = 13
    """Samples of each length, with 16 passkeys each by default."""
    random: int = 5
    """Random patterns; the samples are shared out among them. 0: none."""
    prose: int = 10
    """Stretches of the text itself, scored under full attention and patterns at a sparsity of 0.5."""
    prose_length: int = 2048
    """Tokens of a stretch."""
    sink_size: int = 64
    """First tokens that streaming heads keep."""
    recent_size: int = 256
    """Most recent tokens that streaming heads keep."""
    sink_sizes: tuple[int, ...] = ()
    """Sizes to compare (an ablation): each of these with each of --recent-sizes; --sink-size alone by default."""
    recent_sizes: tuple[int, ...] = ()
    """Likewise; --recent-size alone by default."""
    data: Needles = UNSEEN

    def run(self) -> None:
        """Score what the file lacks, sample by sample."""
        self.check_counts()
        patterns = {}
        for entry in self.patterns:
            name, found, source = entry.partition("=")
            if not found or not name or name in (FULL, STREAMING) or name.startswith(RANDOM):
                raise ValueError(f"a pattern is NAME=FOLDER, the name not that of a baseline, got {entry!r}")
            patterns[name] = source
        for source in patterns.values():
            for sparsity, (sink_size, recent_size) in product(self.sparsity, self._sizes):
                # What is wrong is refused before anything is measured.
                HeadPattern.load(source, sparsity=sparsity, sink_size=sink_size, recent_size=recent_size)
        ledger = self._ledger(patterns)
        jobs = ledger.missing(self._jobs(patterns))
        if not jobs:
            print(f"{self.out} had all of it")
            return
        model, tokenizer = load_model(self.model), load_tokenizer(self.model)
        sets = self.samples_of(tokenizer)
        shape = model.config.num_layers, model.config.num_kv_heads
        for source in patterns.values():
            HeadPattern.load(source).check(model.config)
        with ledger.writing(dtype=str(model.dtype)) as append:
            for job in tqdm(jobs, unit="sample", dynamic_ncols=True):
                pattern = self._pattern(job, patterns, shape)
                if job.prose:
                    scored = score_prose(model, sets[max(sets)], job.length, job.sample, pattern)
                else:
                    scored = score_sample(model, sets[job.length][job.sample], job.length, pattern)
                append(job, scored)
        print(f"{self.out} has all of it")

    def check_counts(self) -> None:
        """See that there is something to score.

        Raises:
            ValueError: a negative count, or no length.
        """
        if min(self.samples, self.random, self.prose) < 0 or not self.lengths or min(self.lengths) < 1:
            raise ValueError(
                f"need lengths of at least 1 and no negative count, got {self.lengths=}, {self.samples=}, "
                f"{self.random=}, {self.prose=}"
            )

    def samples_of(self, tokenizer: Any) -> dict[int, NeedleData]:
        """The samples of each length."""
        return {length: fit(self.data, tokenizer, length) for length in self.lengths}

    @property
    def _sizes(self) -> tuple[tuple[int, int], ...]:
        """Sinks and window, every pair to measure."""
        return tuple(product(self.sink_sizes or (self.sink_size,), self.recent_sizes or (self.recent_size,)))

    def _jobs(self, patterns: dict[str, str]) -> Iterator[Job]:
        """In an order in which every stage is a usable result."""
        for length in self.lengths:
            yield from (Job(FULL, 0.0, length, number) for number in range(self.samples))
            for sizes in self._sizes:
                yield from self._sized(sizes, (Job(STREAMING, 1.0, length, number) for number in range(self.samples)))
                for sparsity in self.sparsity:
                    yield from self._sized(sizes, self._of_sparsity(patterns, sparsity, length))
        # At the file's own sizes.
        for method, sparsity in ((FULL, 0.0), (STREAMING, 1.0), *((name, 0.5) for name in patterns)):
            yield from (Job(method, sparsity, self.prose_length, number, prose=True) for number in range(self.prose))

    def _of_sparsity(self, patterns: dict[str, str], sparsity: float, length: int) -> Iterator[Job]:
        for method in patterns:
            yield from (Job(method, sparsity, length, number) for number in range(self.samples))
        for number in range(self.samples if self.random else 0):
            yield Job(f"{RANDOM} {number % self.random}", sparsity, length, number)

    def _sized(self, sizes: tuple[int, int], jobs: Iterable[Job]) -> Iterator[Job]:
        """The jobs at these sizes; they say so where the file's first line says others."""
        if sizes == (self.sink_size, self.recent_size):
            yield from jobs
        else:
            yield from (SizedJob(**asdict(job), sink_size=sizes[0], recent_size=sizes[1]) for job in jobs)

    def _pattern(self, job: Job, patterns: dict[str, str], shape: tuple[int, int]) -> HeadPattern | None:
        if job.method == FULL:
            return None
        at = job if isinstance(job, SizedJob) else self
        sizes: dict[str, Any] = {"sink_size": at.sink_size, "recent_size": at.recent_size}
        if job.method in patterns:
            return HeadPattern.load(patterns[job.method], sparsity=job.sparsity, **sizes)
        seed = 0 if job.method == STREAMING else int(job.method.removeprefix(RANDOM))
        gates = np.random.default_rng(seed).random(shape)
        return HeadPattern.from_gates(gates, sparsity=job.sparsity, **sizes)

    def _ledger(self, patterns: dict[str, str]) -> Ledger:
        """The file, with what it is and whose gates its names stand for."""
        settings = asdict(self)
        about = {name: settings[name] for name in ("model", "sink_size", "recent_size", "data")}
        gates = {name: fingerprint(HeadPattern.load(source)) for name, source in patterns.items()}
        return Ledger.open(self.out, about, gates)


def fit(config: Needles, tokenizer: Any, length: int) -> NeedleData:
    """Needle data whose samples have at most `length` tokens, all in all, and few less."""
    probe = NeedleData(replace(config, min_length=length, max_length=length, num_lengths=1), tokenizer)
    around = max(len(probe[number].tokens) for number in range(32)) - length
    text = length - around - 8
    if text < 1:
        raise ValueError(
            f"a sample of {length} tokens has too little room for {config.num_passkeys} passkeys, which take {around} "
            "with their questions: raise --lengths or lower --data.num-passkeys"
        )
    return NeedleData(replace(config, min_length=text, max_length=text, num_lengths=1), tokenizer)


def score_sample(
    model: Model, sample: Sample, length: int, pattern: HeadPattern | None, *, kv_dtype: str | None = None
) -> dict[str, Any]:
    """For each passkey: its tokens, how many of them greedy decoding would take, their negative log-likelihood."""
    tokens = jnp.asarray(sample.tokens)[None]
    cache = KVCache.init(model.config, pattern, 1, max(length, tokens.shape[1]), dtype=kv_dtype)
    # The last token before the questions is scored with them: every token of an answer then has one before it.
    begin = sample.tail - 1
    _, cache = prefill(model, tokens[:, :begin], cache)
    scores, _ = score(model, tokens[:, begin:], cache)
    top, logprobs = np.asarray(scores.is_top[0]), np.asarray(scores.logprobs[0], np.float64)
    spans = [slice(first - begin - 1, last - begin - 1) for first, last in sample.answers]
    return {
        "tokens": [span.stop - span.start for span in spans],
        "hits": [int(top[span].sum()) for span in spans],
        "nll": [-float(logprobs[span].sum()) for span in spans],
    }


def score_prose(
    model: Model,
    data: NeedleData,
    length: int,
    number: int,
    pattern: HeadPattern | None,
    *,
    kv_dtype: str | None = None,
) -> dict[str, Any]:
    """Next-token loss on a stretch of the text, nothing hidden in it."""
    begin = int(np.random.default_rng((data.config.seed, number)).integers(0, len(data.text) - length + 1))
    tokens = jnp.asarray(data.text[begin : begin + length])[None]
    scores, _ = score(model, tokens, KVCache.init(model.config, pattern, 1, length, dtype=kv_dtype))
    return {
        "tokens": [length - 1],
        "hits": [int(scores.is_top.sum())],
        "nll": [-float(np.asarray(scores.logprobs, np.float64).sum())],
    }
