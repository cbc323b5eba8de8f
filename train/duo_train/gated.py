"""Forward passes for training: the full model (teacher) and the gated model (student). No cache, no data, no loss.

Gates are of the layers with full attention. The others attend with a window of their own, in both models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from duo_jax.arguments import whole_number
from duo_jax.model.layer import Attend
from duo_jax.model.model import Decoder, Model
from pallas_kernels import full_attention, gated_attention
from pallas_kernels.window import Window, consecutive

State = TypeVar("State")
# The output of each layer with full attention, on its own input.
LayerOutputs = tuple[Float[Array, "B T N H"], ...]
# (state, index, q, k, v, sink logits) -> attention output and the new state, of a layer with full attention.
AttendFull = Callable[[State, int, Array, Array, Array, Array | None], tuple[Array, State]]


def in_full_layers(decoder: Decoder, attend: AttendFull[State], own: Callable[..., Array]) -> Attend[State]:
    """`attend` for layers with full attention, numbered among them, and `own` for those with a window.

    `own` is called as `full_attention` is, with `window` and `sink_logits`.
    """
    number = {layer: index for index, layer in enumerate(decoder.config.full_layers)}

    def attend_by_layer(state: State, layer: int, q: Array, k: Array, v: Array) -> tuple[Array, State]:
        sinks = decoder.sink_logits(layer)
        if layer in number:
            return attend(state, number[layer], q, k, v, sinks)
        return own(q, k, v, window=decoder.config.window(layer), sink_logits=sinks), state

    return attend_by_layer


@dataclass(frozen=True)
class GatedModel:
    """How a model's gated forward pass is computed: `gates * full + (1 - gates) * streaming` in every layer."""

    sink_size: int = 128
    """First tokens that a streaming head sees in training."""
    recent_size: int = 256
    """Most recent tokens that a streaming head sees in training, the query's own included."""
    mixing: Literal["self", "teacher"] = "self"
    """Source of the full term: the gated model's own activations (the paper) or the full model's, without
    gradient (the reference implementation)."""
    rematerialize: bool = True
    """Recompute each layer in the backward pass: the memory of one layer instead of all, a third more time."""
    backend: str | None = None
    """Attention backend; by default the fastest one that is right on this device."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        whole_number("sink_size", self.sink_size, 0)
        whole_number("recent_size", self.recent_size, 1)

    @property
    def window(self) -> Window:
        """What a streaming head sees in training."""
        return Window(self.sink_size, self.recent_size)

    @property
    def mesh(self) -> Mesh | None:
        """Devices that share the work; None: a single device."""
        return None

    def teacher(self, model: Model, tokens: Int32[Array, "B T"]) -> tuple[Float[Array, "B T D"], LayerOutputs]:
        """Final-norm hidden states of the model as it is, and the output of each layer with full attention."""

        def attend(
            outputs: LayerOutputs, _: int, q: Array, k: Array, v: Array, sinks: Array | None
        ) -> tuple[Array, LayerOutputs]:
            out = self.attend(partial(full_attention, backend=self.backend), q, k, v, sink_logits=sinks)
            return out, (*outputs, out)

        decoder = model.decoder
        attend_by_layer = in_full_layers(decoder, attend, self._own)
        options: dict[str, Any] = {"context": tokens.shape[1], "token_mesh": self.mesh}
        return decoder.hidden(tokens, _positions(tokens), attend_by_layer, (), **options)

    def student(
        self,
        model: Model,
        tokens: Int32[Array, "B T"],
        gates: Float[Array, "L K"],
        full: LayerOutputs | None = None,
    ) -> Float[Array, "B T D"]:
        """Final-norm hidden states of the gated model, differentiable in `gates`; `full` as `teacher` returns it.

        Gates are of the layers with full attention, in order.
        """

        def attend(state: Array, index: int, q: Array, k: Array, v: Array, sinks: Array | None) -> tuple[Array, Array]:
            attention = partial(gated_attention, window=self.window, backend=self.backend)
            of_layer = {"gates": state[index], "full": None if full is None else full[index], "sink_logits": sinks}
            return self.attend(attention, q, k, v, **of_layer), state

        decoder, positions = model.decoder, _positions(tokens)
        attend_by_layer = in_full_layers(decoder, attend, self._own)
        options: dict[str, Any] = {"context": tokens.shape[1], "token_mesh": self.mesh}
        options["rematerialize"] = self.rematerialize
        return decoder.hidden(tokens, positions, attend_by_layer, gates, **options)[0]

    def _own(self, q: Array, k: Array, v: Array, *, window: Window, sink_logits: Array | None) -> Array:
        attention = partial(full_attention, window=window, backend=self.backend)
        return self.attend(attention, q, k, v, sink_logits=sink_logits)

    def attend(
        self,
        attention: Callable[..., Array],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        gates: Float[Array, "K"] | None = None,
        full: Float[Array, "B T N H"] | None = None,
        sink_logits: Float[Array, "N"] | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attention of one layer, on one device; `attention` is called with the arrays that are not None, by name."""
        optional = {"gates": gates, "full": full, "sink_logits": sink_logits}
        return attention(q, k, v, **{name: x for name, x in optional.items() if x is not None})


def _positions(tokens: Int32[Array, "B T"]) -> Int32[Array, "B T"]:
    return consecutive(jnp.zeros(tokens.shape[0], jnp.int32), tokens.shape[1])
