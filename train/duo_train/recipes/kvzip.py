"""`kvzip`: no training. The most attention that any token of a context receives while the model repeats the context.

After KVzip's head scores (arXiv 2505.23416): a head with low scores can stream.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32
from transformers import PreTrainedTokenizerBase

from duo_jax.arguments import whole_number
from duo_jax.mesh.mesh import constrain
from duo_jax.model.model import Model
from duo_jax.text.template import has_template, split
from duo_jax.text.tokens import encode
from duo_train.data.needles import DATE, beginning
from duo_train.gated import GatedModel, in_full_layers
from duo_train.recipes.base import Recipe
from duo_train.run import Run
from pallas_kernels import full_attention
from pallas_kernels.merge import softmax_with_sinks

REQUEST = "\n\nRepeat the previous context exactly.\n\n"
Scores = tuple[Float[Array, "K"], ...]
# Number of queries whose attention to the whole sequence is computed at once.
BLOCK = 128


@dataclass(frozen=True)
class KVzip(Recipe):
    """Gates from the attention that a context receives while it is repeated."""

    num_samples: int = 4
    """Contexts; a head's gate is the mean over them."""
    length: int = 2048
    """Tokens of each context."""

    def check(self, run: Run) -> None:
        """Contexts must be longer than the sinks, and the text longer than a context."""
        sinks, text = run.attention.sink_size, run.data.text
        whole_number("num_samples", self.num_samples, 1)
        whole_number("length", self.length, sinks + 1, way=f"it must be more than the {sinks} sinks")
        if len(text) < self.length:
            raise ValueError(f"the haystack has {len(text)} tokens, fewer than {self.length=}: give a longer text")

    def find(self, run: Run) -> Float[np.ndarray, "L K"]:
        """Mean over contexts of the most attention received from queries that a streaming head would hide it from."""
        self.devices(run.model.config, run.devices, fsdp=run.model.is_fsdp)
        self.check(run)
        text = run.data.text
        scores = []
        for number in range(self.num_samples):
            rng = np.random.default_rng((run.data.config.seed, number))
            begin = int(rng.integers(0, len(text) - self.length + 1))
            context = text[begin : begin + self.length]
            tokens, first = _repeat(run.data.tokenizer, context)
            score = _received(run.model, tokens[None], first, self.length, run.attention)
            scores.append(np.asarray(score, np.float64))
            run.report(number + 1, self.num_samples, {})
        return np.mean(scores, axis=0)


def _repeat(tokenizer: PreTrainedTokenizerBase, context: Int32[np.ndarray, "C"]) -> tuple[Int32[np.ndarray, "T"], int]:
    """The context, the request and the context again, in the chat template if there is one; and the context's start."""
    if has_template(tokenizer):
        before, after = split(tokenizer, [{"role": "user", "content": REQUEST}], date_string=DATE)
        head = encode(tokenizer, before)
    else:
        head, after = beginning(tokenizer), REQUEST
    request = encode(tokenizer, after)
    return np.concatenate([np.asarray(part, np.int32) for part in (head, context, request, context)]), len(head)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _received(
    model: Model, tokens: Int32[Array, "1 T"], first: int, length: int, attention: GatedModel
) -> Float[Array, "L K"]:
    """The most attention that a context, `length` tokens from `first`, receives while it is repeated at the end."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    attends = partial(full_attention, backend=attention.backend)

    def attend(scores: Scores, layer: int, q: Array, k: Array, v: Array, sinks: Array | None) -> tuple[Array, Scores]:
        groups = q[0].reshape(q.shape[1], k.shape[2], -1, q.shape[3]).transpose(1, 0, 2, 3)
        per_head = partial(_most, first=first, length=length, attention=attention)
        by_head = None if sinks is None else sinks.reshape(k.shape[2], -1)
        most = lax.map(lambda head: per_head(*head), (groups, k[0].transpose(1, 0, 2), by_head))
        return attends(q, k, v, sink_logits=sinks), (*scores, most)

    scores: Scores = ()
    decoder = model.decoder
    attend_by_layer = in_full_layers(decoder, attend, attends)
    return constrain(
        jnp.stack(decoder.hidden(tokens, positions, attend_by_layer, scores, context=tokens.shape[1])[1]), model.mesh
    )


def _most(
    q: Float[Array, "T G H"],
    k: Float[Array, "T H"],
    sink_logits: Float[Array, "G"] | None,
    *,
    first: int,
    length: int,
    attention: GatedModel,
) -> Float[Array, ""]:
    """One KV head, in blocks of the queries that repeat the context."""
    total, _, head_dim = q.shape
    block = min(BLOCK, length)
    context = slice(max(first, attention.sink_size), first + length)
    k_pos = jnp.arange(total, dtype=jnp.int32)[None, None, :]

    def per_block(i: Array, most: Array) -> Array:
        begin = jnp.minimum(total - length + i * block, total - block)
        rows = lax.dynamic_slice_in_dim(q, begin, block, 0).astype(jnp.float32)
        scores = jnp.einsum("tgh,sh->tgs", rows, k.astype(jnp.float32)) * head_dim**-0.5
        q_pos = (begin + jnp.arange(block, dtype=jnp.int32))[:, None, None]
        weights = softmax_with_sinks(
            jnp.where(k_pos <= q_pos, scores, -jnp.inf), None if sink_logits is None else sink_logits[None]
        )
        # The end of the context may still be in the window of the first repeated tokens.
        weights = jnp.where(k_pos <= q_pos - attention.recent_size, weights, 0.0)
        return jnp.maximum(most, weights[:, :, context].max())

    return lax.fori_loop(0, -(-length // block), per_block, jnp.float32(0))
