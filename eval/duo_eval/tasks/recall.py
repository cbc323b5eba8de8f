"""`duo eval recall`: the recall that a pattern loses, by teacher forcing: how likely is each word of a hidden passkey?

Each sample hides many passkeys. All of them are asked for in turn and answered correctly, and every token of an answer
is scored given everything before it. That uses every token of a small model's answers; an exact match of whole keys
would use one bit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from duo_train.data.needles import NeedleData, Needles

from duo_eval.runner.record import Record, fingerprint
from duo_eval.runner.run import Answer, run
from duo_eval.stats.recall_cells import FULL_ATTENTION, RANDOM, STREAMING
from duo_eval.tasks.passkeys import UNSEEN, fit, score_text
from duo_eval.tasks.recall_results import RESULT
from duo_jax import HeadPattern, ModelConfig, load_model, load_tokenizer
from duo_jax.arguments import whole_number
from duo_jax.certified import inference
from duo_jax.checkpoint.fingerprint import weights_fingerprint
from duo_jax.checkpoint.open import open_config
from duo_jax.plan import any_pattern
from pallas_kernels.types import Request


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
    """One sample under one pattern whose sizes differ from those in the file's head."""

    sink_size: int = 0
    recent_size: int = 0


@dataclass(frozen=True)
class Scoring:
    """Samples, sparsities and sizes of the scoring."""

    sparsity: tuple[float, ...] = (0.25, 0.5, 0.6, 0.7, 0.75, 0.8)
    """Fractions of KV heads that stream."""
    lengths: tuple[int, ...] = (2048, 4096)
    """Tokens of a sample."""
    samples: int = 13
    """Samples of each length, with 16 passkeys each by default."""
    random: int = 5
    """Random patterns; the samples are divided among them. 0: none."""
    prose: int = 10
    """Stretches of the text itself, scored under full attention and patterns at a sparsity of 0.5."""
    prose_length: int = 2048
    """Tokens of a stretch."""
    sink_size: int = 64
    """First tokens that streaming heads keep."""
    recent_size: int = 256
    """Most recent tokens that streaming heads keep."""
    sink_sizes: tuple[int, ...] = ()
    """Sizes to compare (an ablation): each of these with each of --recent-sizes; by default only --sink-size."""
    recent_sizes: tuple[int, ...] = ()
    """Likewise; by default only --recent-size."""
    data: Needles = UNSEEN

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every pair of sinks and window to measure."""
        return tuple(product(self.sink_sizes or (self.sink_size,), self.recent_sizes or (self.recent_size,)))

    def check(self) -> None:
        """Check everything that does not depend on the pattern.

        Raises:
            ValueError: a negative count, nothing to score, or a sparsity or sizes that no pattern has.
        """
        for name in ("samples", "random", "prose"):
            whole_number(name, getattr(self, name), 0)
        if not self.lengths:
            raise ValueError("--lengths must have at least one length")
        for length in self.lengths:
            whole_number("lengths", length, 1)
        if not self.samples and not self.prose:
            raise ValueError("--samples 0 --prose 0 leaves nothing to score")
        for sparsity, (sink_size, recent_size) in product(self.sparsity, self.sizes):
            HeadPattern.from_gates(np.ones((1, 1)), sparsity=sparsity, sink_size=sink_size, recent_size=recent_size)

    def texts(self, tokenizer: Any) -> dict[int, NeedleData]:
        """The samples of each length.

        Raises:
            ValueError: a length in which the passkeys and their questions have no room.
        """
        return {length: fit(self.data, tokenizer, length) for length in self.lengths}


@dataclass(frozen=True)
class Recall:
    """Score hidden passkeys under full attention, head patterns, random ones, and streaming heads only; draw."""

    patterns: tuple[str, ...] = ("smollm2=smollm2-135m-instruct",)
    """Patterns to compare, each NAME=FOLDER or NAME=PUBLISHED-NAME."""
    out: Path = Path("recall.jsonl")
    """File to append to; results that it already has are not computed again. The figures are written next to it."""
    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id."""
    scoring: Annotated[Scoring, tyro.conf.arg(name="")] = Scoring()

    def requests(self) -> list[Request]:
        """The attention under all patterns, for certification."""
        config = open_config(self.model)
        patterns = [
            any_pattern(config, sparsity, sink_size=sink, recent_size=recent)
            for sink, recent in self.scoring.sizes
            for sparsity in (0.5, 1.0)
        ]
        return inference(config, None, *patterns)

    def run(self) -> None:
        """Score the missing items, sample by sample, and plot."""
        self.check()
        sources = self._sources()
        record = self._record({name: fingerprint(HeadPattern.load(source)) for name, source in sources.items()})
        run(record, self._jobs(sources), lambda _: self._prepare(sources), unit="sample")
        if self.scoring.samples:
            RESULT.show_figures(self.out)

    def check(self) -> None:
        """Refuse settings that need no pattern to be refused.

        Raises:
            ValueError: impossible names or settings, or a file with other ones.
        """
        self.scoring.check()
        self._sources()
        self._record({})

    def _prepare(self, sources: Mapping[str, str]) -> tuple[str, Answer[Job]]:
        """Load the model, check the patterns."""
        config, tokenizer = open_config(self.model), load_tokenizer(self.model)
        for source in sources.values():
            HeadPattern.load(source).check(config)
        model, texts = load_model(self.model), self.scoring.texts(tokenizer)

        def score(jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
            for job in jobs:
                pattern = self._pattern(job, sources, model.config)
                data = texts[max(texts) if job.prose else job.length]
                yield job, score_text(model, data, job.length, job.sample, pattern, prose=job.prose)

        return str(model.dtype), score

    def _sources(self) -> dict[str, str]:
        """The folder or published name of each pattern, by its name."""
        sources: dict[str, str] = {}
        for entry in self.patterns:
            name, equals, source = entry.partition("=")
            if not equals or not name or name in (FULL_ATTENTION, STREAMING) or name.startswith(RANDOM):
                raise ValueError(f"a pattern is NAME=FOLDER, its name not that of a baseline, got {entry!r}")
            if name in sources:
                raise ValueError(f"patterns need different names, got {name!r} twice")
            sources[name] = source
        return sources

    def _jobs(self, names: Iterable[str]) -> Iterator[Job]:
        """In an order in which every stage is a usable result."""
        how = self.scoring
        for length in how.lengths:
            yield from (Job(FULL_ATTENTION, 0.0, length, number) for number in range(how.samples))
            for sizes in how.sizes:
                yield from self._sized(sizes, (Job(STREAMING, 1.0, length, number) for number in range(how.samples)))
                for sparsity in how.sparsity:
                    yield from self._sized(sizes, self._of_sparsity(names, sparsity, length))
        # At the sizes of the file's head.
        for method, sparsity in ((FULL_ATTENTION, 0.0), (STREAMING, 1.0), *((name, 0.5) for name in names)):
            yield from (Job(method, sparsity, how.prose_length, number, prose=True) for number in range(how.prose))

    def _of_sparsity(self, names: Iterable[str], sparsity: float, length: int) -> Iterator[Job]:
        how = self.scoring
        for method in names:
            yield from (Job(method, sparsity, length, number) for number in range(how.samples))
        for number in range(how.samples if how.random else 0):
            yield Job(f"{RANDOM} {number % how.random}", sparsity, length, number)

    def _sized(self, sizes: tuple[int, int], jobs: Iterable[Job]) -> Iterator[Job]:
        """The jobs at these sizes; they name the sizes if they differ from those in the file's head."""
        if sizes == (self.scoring.sink_size, self.scoring.recent_size):
            yield from jobs
        else:
            yield from (SizedJob(**asdict(job), sink_size=sizes[0], recent_size=sizes[1]) for job in jobs)

    def _pattern(self, job: Job, sources: Mapping[str, str], config: ModelConfig) -> HeadPattern:
        if job.method == FULL_ATTENTION:
            return HeadPattern.full(config)
        at = job if isinstance(job, SizedJob) else self.scoring
        sizes: dict[str, Any] = {"sink_size": at.sink_size, "recent_size": at.recent_size}
        if job.method in sources:
            return HeadPattern.load(sources[job.method], sparsity=job.sparsity, **sizes).of(config)
        seed = 0 if job.method == STREAMING else int(job.method.removeprefix(RANDOM))
        gates = np.random.default_rng(seed).random((config.num_layers, config.num_kv_heads))
        return HeadPattern.from_gates(gates, sparsity=job.sparsity, **sizes, window_layers=config.window_layers)

    def _record(self, gates: Mapping[str, str]) -> Record:
        """The file, with its settings and the gates behind its names."""
        how = self.scoring
        sizes = {"sink_size": how.sink_size, "recent_size": how.recent_size}
        about = {"model": self.model, **sizes, "data": how.data.saved()}
        return Record.open(self.out, about, {**gates, "weights": weights_fingerprint(self.model)})
