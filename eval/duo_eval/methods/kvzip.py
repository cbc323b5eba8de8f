"""KVzip (Kim et al. 2025, arXiv 2505.23416): a cache holds the tokens that the model needs to repeat the context.

The prompt is read by full attention. Then the model reads a request to repeat it and the text itself, part by part: the
score of a token of a head is the most attention that it receives from any query of the part that repeats it. Tokens
with the highest scores stay, over all heads of all layers together. As in the authors' code, the softmax of a score is
over the first tokens, the part, and the request with its repetition; and the first tokens, the system prompt, always
stay. This is the form that scores tokens: the recipe `kvzip` of `duo identify` scores heads.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from duo_train.data.needles import DATE
from jax import lax
from jaxtyping import Array, Bool, Float, Int32
from transformers import PreTrainedTokenizerBase

from duo_eval.methods.eviction import ALWAYS, attention_weights, by_head
from duo_eval.methods.scored import Scored, Scoring, highest, share
from duo_jax import Model
from duo_jax.arguments import whole_number
from duo_jax.generation.chunks import bucket
from duo_jax.text.template import has_template, split
from duo_jax.text.tokens import encode, encode_inside
from pallas_kernels import Heads, Pools, Window, full_attention, prefill_attention
from pallas_kernels.schedule import block_at, cdiv

REQUEST = "\n\nRepeat the previous context exactly."
NEXT_REQUEST = "\n\nRepeat the part of the previous context exactly, starting with "
# Last tokens of the part before, with which the request for the next one ends.
OVERLAP = 8
# Queries whose weights are in memory at once.
BLOCK = 128


class Part(NamedTuple):
    """A part of the context, and the tokens that repeat it: a request, the end of the message, the part."""

    begin: int
    end: int
    repeat: Int32[np.ndarray, "R"]


@dataclass(frozen=True)
class KVzip(Scoring):
    """Scores by the attention that a token receives while the context is repeated."""

    before: tuple[int, ...]
    """Tokens before a user's message, which always stay where a prompt begins with them."""
    request: tuple[int, ...]
    """Tokens that ask for the first part."""
    next_request: tuple[int, ...]
    """Tokens that ask for a later part, whose predecessor's last tokens follow."""
    after: tuple[int, ...]
    """Tokens between a request and the answer."""
    chunk: int = 2000
    """Tokens of a part; the paper's."""
    sinks: int = 4
    """First tokens, which always stay, of a prompt that begins otherwise."""

    name: ClassVar[str] = "kvzip-tokens"

    def __post_init__(self) -> None:
        """Check the sizes."""
        whole_number("chunk", self.chunk, 1)
        whole_number("sinks", self.sinks, 0)

    @classmethod
    def create(cls, tokenizer: PreTrainedTokenizerBase | None, **options: Any) -> "KVzip":
        """See `Method.create`: the requests are in the tokenizer's chat template, if it has one."""
        texts = {"before", "request", "next_request", "after"}
        if tokenizer is None and not texts <= set(options):
            raise ValueError(f"{cls.name} needs a request as tokens: pass tokenizer=, or {'=, '.join(sorted(texts))}=")
        if tokenizer is not None:
            # The date of every task: a template may write it before the message.
            before, after = split(tokenizer, date_string=DATE) if has_template(tokenizer) else ("", "\n")
            options = {
                "before": tuple(encode(tokenizer, before)) if before else (),
                "request": tuple(encode_inside(tokenizer, REQUEST)),
                "next_request": tuple(encode_inside(tokenizer, NEXT_REQUEST)),
                "after": tuple(encode_inside(tokenizer, after)),
            } | options
        return cls(**options)

    def least(self) -> int:
        """See `Scoring.least`: the tokens that always stay and one more."""
        return max(len(self.before), self.sinks) + 1

    def choose(self, scores: Float[np.ndarray, "L K T"], budget: float) -> Bool[np.ndarray, "L K T"]:
        """See `Scoring.choose`: the highest scores of all heads of all layers."""
        rows = scores.reshape(-1, scores.shape[-1])
        return highest(rows, share(budget, rows.size)).reshape(scores.shape)

    def observe(self, model: Model, tokens: Int32[np.ndarray, "T"]) -> tuple[Float[Array, "V"], Scored, int]:
        """See `Scoring.observe`."""
        length, size = len(tokens), bucket(len(tokens))
        first = self.first(tokens)
        logits, prompt = _read(model, np.pad(tokens, (0, size - length)), np.int32(length), np.int32(first))
        # The same sizes for every prompt of the bucket.
        width = min(self.chunk, size)
        longest = max(len(self.request), len(self.next_request) + OVERLAP) + len(self.after) + width
        for part in self.parts(tokens, first):
            count = np.int32(len(part.repeat))
            repeat = np.pad(part.repeat, (0, longest - len(part.repeat)))
            span = np.int32(part.begin), np.int32(part.end)
            sizes = count, np.int32(length), np.int32(first)
            prompt = _score(model, prompt, repeat, sizes, span, min(self.least() - 1, size), width)
        # In addition to the prompt, one layer's keys and values of a repetition.
        entry = 2 * prompt.k.shape[1] * prompt.k.shape[3] * prompt.k.dtype.itemsize
        return logits, prompt, prompt.k.nbytes + prompt.v.nbytes + entry * longest

    def first(self, tokens: Int32[np.ndarray, "T"]) -> int:
        """How many of the first tokens always stay."""
        begins = len(tokens) > len(self.before) > 0 and tuple(tokens[: len(self.before)]) == self.before
        return len(self.before) if begins else min(self.sinks, len(tokens))

    def parts(self, tokens: Int32[np.ndarray, "T"], first: int) -> Iterator[Part]:
        """The parts of a prompt after its first tokens."""
        for begin in range(first, len(tokens), self.chunk):
            end = min(begin + self.chunk, len(tokens))
            asked = self.request
            if begin > first:
                asked = (*self.next_request, *tokens[begin - OVERLAP : begin].tolist())
            yield Part(begin, end, np.asarray([*asked, *self.after, *tokens[begin:end]], np.int32))


@jax.jit
def _read(
    model: Model, tokens: Int32[Array, "S"], length: Int32[Array, ""], first: Int32[Array, ""]
) -> tuple[Float[Array, "V"], Scored]:
    """Read a prompt, padded at its end: the logits after its last token, and its tokens, of which `first` stay."""
    position = jnp.arange(tokens.shape[0], dtype=jnp.int32)

    def attend(state: tuple[Scored, ...], layer: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Scored, ...]]:
        keys, values = k[0].transpose(1, 0, 2), v[0].transpose(1, 0, 2)
        score = jnp.broadcast_to(jnp.where(position < first, ALWAYS, 0.0), keys.shape[:2])
        return full_attention(q, k, v), (*state, Scored(keys, values, score))

    decoder = model.decoder
    layers: tuple[Scored, ...] = ()
    hidden, layers = decoder.hidden(tokens[None], position[None], attend, layers)
    return decoder.logits(hidden[0, length - 1]), jax.tree.map(lambda *x: jnp.stack(x), *layers)


@functools.partial(jax.jit, static_argnums=(5, 6), donate_argnums=1)
def _score(
    model: Model,
    prompt: Scored,
    repeat: Int32[Array, "R"],
    sizes: tuple[Int32[Array, ""], Int32[Array, ""], Int32[Array, ""]],
    span: tuple[Int32[Array, ""], Int32[Array, ""]],
    most_first: int,
    width: int,
) -> Scored:
    """Score the tokens from `span[0]` to `span[1] - 1` of a prompt, at most `width`, while they are repeated.

    `sizes` are the tokens of the repetition, of the prompt, and of those at its start that stay, at most `most_first`.
    """
    count, length, first = sizes
    size = prompt.score.shape[2]
    earliest = jnp.arange(most_first, dtype=jnp.int32) < first
    begin = jnp.minimum(span[0], size - width)
    index = begin + jnp.arange(width, dtype=jnp.int32)
    is_part = (index >= span[0]) & (index < span[1])

    def attend(scores: Float[Array, "L K S"], layer: int, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        keys, heads = prompt.k[layer], k.shape[2]
        nothing = jnp.zeros((0, 1, 0, keys.shape[2]), keys.dtype)
        pools = Pools(keys[:, None], prompt.v[layer][:, None], nothing, nothing)
        every = Heads(jnp.ones(heads, bool), jnp.arange(heads, dtype=jnp.int32))
        out = prefill_attention(q, k, v, pools, every, start=length[None], lengths=count[None], window=Window(0, 0))
        part = lax.dynamic_slice_in_dim(keys, begin, width, 1)
        shown = [keys[:, :most_first], part, k[0].transpose(1, 0, 2)]
        most = _most(by_head(q, heads), shown, jnp.concatenate([earliest, is_part]), count)[:, most_first:]
        old = lax.dynamic_slice_in_dim(scores[layer], begin, width, 1)
        new = jnp.where(is_part, most, old)
        return out, scores.at[layer].set(lax.dynamic_update_slice_in_dim(scores[layer], new, begin, 1))

    positions = length + jnp.arange(repeat.shape[0], dtype=jnp.int32)
    _, scores = model.decoder.hidden(repeat[None], positions[None], attend, prompt.score)
    return prompt._replace(score=scores)


def _most(
    q: Float[Array, "K G R H"],
    shown: list[Float[Array, "K _ H"]],
    is_earlier: Bool[Array, "W"],
    count: Int32[Array, ""],
) -> Float[Array, "K W"]:
    """The most attention that first tokens and a part receive from `count` queries.

    `shown` are keys: of first tokens and of the part, of which all see those that `is_earlier` marks, and the queries'
    own, which they see causally.
    """
    size, width = q.shape[2], len(is_earlier)
    block = min(BLOCK, size)
    own = jnp.arange(size, dtype=jnp.int32)

    def some_queries(i: Array, most: Float[Array, "K W"]) -> Float[Array, "K W"]:
        begin, index = block_at(i, block, size)
        rows = index[0]
        earlier = jnp.broadcast_to(is_earlier, (block, width))
        seen = jnp.concatenate([earlier, own[None, :] <= rows[:, None]], axis=1)
        weights = attention_weights(lax.dynamic_slice_in_dim(q, begin, block, 2), shown, seen[None])
        received = jnp.where((rows < count)[:, None], weights[..., :width], 0.0)
        return jnp.maximum(most, received.max((1, 2)))

    none = jnp.zeros((q.shape[0], width), jnp.float32)
    return lax.fori_loop(jnp.int32(0), cdiv(count, block), some_queries, none)
