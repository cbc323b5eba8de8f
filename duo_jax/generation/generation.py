"""Generation: `generate` as one compiled program, and `stream`, the same tokens one step at a time. Knows no text.

Afterwards the cache holds the prompt and every token generated: to continue a conversation, pass the cache and only the
new tokens.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Int32
from numpy.typing import ArrayLike

from duo_jax.arguments import MOST_TOKENS, ArgumentError, whole_number
from duo_jax.cache.cache import KVCache
from duo_jax.checks import (
    check_cache,
    check_generation,
    check_history,
    check_key,
    check_model,
    check_prompt,
    is_traced,
    warn_of_quantization,
)
from duo_jax.generation.chunks import answer_capacity, bucket, cache_room, chunk_width
from duo_jax.generation.infer import compile_prefill, run_prefill
from duo_jax.generation.sampling import Greedy, Sampler
from duo_jax.generation.token_loop import Generation, Generator, Prompt, Stream, Watch, check_logits, row_keys
from duo_jax.model.model import Model
from duo_jax.model.precision import AnyDtype
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.sizes import check_free

# The `Request._programs` that this process has compiled.
_COMPILED: set[Hashable] = set()


@dataclass(frozen=True)
class Request:
    """A prompt that was checked against its model and cache, ready to be continued in either way."""

    generator: Generator
    model: Model
    prompt: Prompt
    cache: KVCache
    max_new_tokens: int
    width: int

    def run(self) -> Generation:
        """Continue it in one compiled program, and wait for its end.

        Raises:
            FloatingPointError: NaN or infinite logits, with the step.
        """
        out, failed = self.start()
        if not is_traced(failed):
            check_logits(int(failed), self.model.dtype)
        return out

    def start(self) -> tuple[Generation, Int32[Array, ""]]:
        """Start the program, without waiting for it; the second result is for `check_logits`."""
        tokens, most = self.prompt.tokens, self.max_new_tokens
        padded = bucket(-(-tokens.shape[1] // self.width)) * self.width
        prompt = self.prompt._replace(tokens=np.pad(tokens, ((0, 0), (0, padded - tokens.shape[1]))))
        sizes = {"capacity": answer_capacity(most), "width": self.width}
        out, failed = self.generator.run(self.model, prompt, self.cache, np.int32(most), **sizes)
        return out._replace(tokens=out.tokens[:, :most], logprobs=out.logprobs[:, :most]), failed

    def stream(self, progress: Callable[[int], None] | None = None, watch: Watch | None = None) -> Stream:
        """Compute the prompt and return the steps after it.

        With `watch`, programs that this process has not run yet are compiled first, so that the times of the later
        phases do not include compilation.
        """
        tokens, lengths, seen, keys = self.prompt
        if watch:
            if (programs := self._programs) not in _COMPILED:
                watch("compile")
                self._compile()
                _COMPILED.add(programs)
            watch("prefill")
        logits, cache = run_prefill(
            self.model, tokens, self.cache, lengths, self.width, backend=self.generator.backend, progress=progress
        )
        if watch:
            watch(None)
        return self.generator.stream(self.model, logits, cache, self.max_new_tokens, seen=seen, keys=keys, watch=watch)

    @property
    def _programs(self) -> Hashable:
        """What the programs of `stream` depend on."""
        leaves, structure = jax.tree.flatten(self.cache)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return self.generator, self.model.config, self.width, structure, shapes

    def _compile(self) -> None:
        """Compile the programs of `stream`, which jax then finds when they are called; nothing is computed."""
        tokens, lengths, seen, keys = self.prompt
        backend = self.generator.backend
        logits, cache = compile_prefill(self.model, tokens, self.cache, lengths, self.width, backend=backend)
        self.generator.compile(self.model, logits, cache, seen=seen, keys=keys)


def generate(
    model: Model,
    tokens: ArrayLike,
    *,
    pattern: HeadPattern | None = None,
    max_new_tokens: int = 128,
    sampler: Sampler = Greedy(),
    lengths: ArrayLike | None = None,
    eos_ids: tuple[int, ...] = (),
    key: Array | int | None = None,
    cache: KVCache | None = None,
    kv_dtype: AnyDtype | None = None,
    history: ArrayLike | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Generation:
    """Continue a batch of prompts in one compiled program; every row ends independently.

    Args:
        model: the weights.
        tokens: `[B, T]` token ids, ragged rows padded at the right.
        pattern: which heads stream; None for full attention. Not with `cache`, which has one.
        max_new_tokens: most tokens generated per row.
        sampler: how a token is chosen.
        lengths: `[B]` valid tokens of each row; all of them by default.
        eos_ids: tokens that end a row; `model.config.eos_ids` has the model's own.
        key: a `jax.random` key or a seed; needed by a random sampler. Row b depends only on (key, b).
        cache: a cache to continue from; it is donated. By default, one of the right size is made.
        kv_dtype: data type of the cache that is made, as in `KVCache.init`; the weights' by default.
        history: `[B, n]` token ids that a repetition penalty counts besides the prompt: those in `cache`.
        chunk_size: prompt tokens computed at a time; by default chosen by the prompt's length.
        backend: attention backend; None takes the fastest one that is right on this device.

    Raises:
        ValueError: an invalid argument, before any compute.
        FloatingPointError: NaN or infinite logits, with the step: weights that are not finite, or float16 overflowed.
    """
    request = prepare(
        model,
        tokens,
        pattern=pattern,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        lengths=lengths,
        eos_ids=eos_ids,
        key=key,
        cache=cache,
        kv_dtype=kv_dtype,
        history=history,
        chunk_size=chunk_size,
        backend=backend,
    )
    return request.run()


def stream(
    model: Model,
    tokens: ArrayLike,
    *,
    pattern: HeadPattern | None = None,
    max_new_tokens: int = 128,
    sampler: Sampler = Greedy(),
    lengths: ArrayLike | None = None,
    eos_ids: tuple[int, ...] = (),
    key: Array | int | None = None,
    cache: KVCache | None = None,
    kv_dtype: AnyDtype | None = None,
    history: ArrayLike | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Stream:
    """Like `generate`, one step at a time: `for step in stream(...): step.token`.

    The prompt is computed before this returns; `progress` is called as in `prefill`.
    """
    request = prepare(
        model,
        tokens,
        pattern=pattern,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        lengths=lengths,
        eos_ids=eos_ids,
        key=key,
        cache=cache,
        kv_dtype=kv_dtype,
        history=history,
        chunk_size=chunk_size,
        backend=backend,
    )
    return request.stream(progress)


def prepare(
    model: Model,
    tokens: ArrayLike,
    *,
    pattern: HeadPattern | None = None,
    max_new_tokens: int = 128,
    sampler: Sampler = Greedy(),
    lengths: ArrayLike | None = None,
    eos_ids: tuple[int, ...] = (),
    key: Array | int | None = None,
    cache: KVCache | None = None,
    kv_dtype: AnyDtype | None = None,
    history: ArrayLike | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
    rows: Sequence[int] | None = None,
) -> Request:
    """Check the arguments of `generate` and `stream`, and make a cache if none was given.

    Random draws of a row depend on the key and on its index in `rows`, by default its index in the batch.
    """
    check_model(model)
    max_new_tokens, key = whole_number("max_new_tokens", max_new_tokens, 1), check_key("key", key)
    eos_ids = check_generation(
        model.config,
        sampler=sampler,
        key=key,
        eos_ids=eos_ids,
        cache=cache,
        pattern=pattern,
        kv_dtype=kv_dtype,
    )
    tokens, lengths = check_prompt(model.config, tokens, lengths)
    longest = int(np.max(lengths))
    tokens = tokens[:, :longest]
    width = chunk_width(longest, chunk_size, rows=len(tokens))
    if cache is None:
        total = longest + max_new_tokens
        if total > MOST_TOKENS:
            raise ArgumentError("max_new_tokens", f"must be at most {MOST_TOKENS - longest}, got {max_new_tokens}")
        room = model.config.room(min(cache_room(total, len(tokens)), MOST_TOKENS))
        cache = KVCache.init(model.config, pattern, len(tokens), room, dtype=kv_dtype, mesh=model.mesh)
    check_cache(model, cache, lengths.astype(np.int64) + max_new_tokens)
    warn_of_quantization(model, cache)
    answer = 8 * len(tokens) * answer_capacity(max_new_tokens)
    check_free(answer, f"max_new_tokens={max_new_tokens} takes {answer / 1e9:.1f} GB for the answer: ask for fewer")
    seen = np.zeros((len(tokens), model.config.vocab_size), bool)
    for row, count in enumerate(lengths):
        seen[row, tokens[row, :count]] = True
    if history is not None:
        seen[np.arange(len(seen))[:, None], check_history(model.config, history, len(seen))] = True
    prompt = Prompt(tokens, lengths, seen, row_keys(key, np.arange(len(tokens)) if rows is None else np.asarray(rows)))
    generator = Generator(sampler, eos_ids, backend)
    return Request(generator, model, prompt, cache, max_new_tokens, width)
