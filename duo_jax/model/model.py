"""The decoder of every family, and `Model`, the pytree that functions take. Knows no cache and no pattern.

Only attention differs between inference, training and evaluation, so it is an argument: `attend`. Where devices have
slices of all weights (FSDP), each part of the decoder is gathered when it is used, see `Decoder.whole`.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from duo_jax import pytree
from duo_jax.mesh.mesh import AnyMesh, constrain
from duo_jax.model.config import ModelConfig
from duo_jax.model.layer import Attend, Layer
from duo_jax.model.linear import Embed, Linear, by_output
from duo_jax.model.norm import rms_norm
from duo_jax.model.precision import AnyDtype
from duo_jax.model.rope import Angles, rotation
from duo_jax.model.row_groups import ByRow, at_once
from duo_jax.model.weights import multiply
from duo_jax.sizes import host_total, nbytes, size_text

State = TypeVar("State")
Part = TypeVar("Part", bound=nnx.Module)
# The operations that make a part whole, see `Decoder.whole`.
GATHERING = ("optimization_barrier", "sharding_constraint")


class Decoder(nnx.Module):
    """Embedding, decoder layers, final norm, and the head to logits.

    Attributes:
        mesh: devices that share the heads; None: the weights have the order of one device.
        sliced: devices that each have a slice of every array (FSDP).
        is_by_output: whether linear maps are stored `[out, in]`, see `Model.by_output`.
    """

    sliced: AnyMesh | None = None
    is_by_output: bool = False

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        mesh: AnyMesh | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Build with random weights, or only some `layers`. On a mesh, heads and channels are in its order."""
        self.config, self.mesh = config, mesh
        settings: dict[str, Any] = {"dtype": dtype, "rngs": rngs, "weight_dtype": config.embed_dtype}
        self.embed = Embed(config.vocab_size, config.embed_dim, **settings)
        build = functools.partial(Layer, config, dtype=dtype, rngs=rngs, mesh=mesh)
        numbers = range(config.num_layers) if layers is None else layers
        self.layers = nnx.List([build(has_experts=config.has_experts(number)) for number in numbers])
        self.norm = rms_norm(config.embed_dim, config, dtype=dtype, rngs=rngs)
        if not config.tied_head:
            self.head = Linear(config.embed_dim, config.vocab_size, bias=False, **settings)

    def hidden(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        attend: Attend[State],
        state: State,
        *,
        context: int | None = None,
        caps_scores: bool = False,
        rematerialize: bool = False,
        token_mesh: AnyMesh | None = None,
        by_row: ByRow = at_once,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Final-norm hidden states of every token; `state` is threaded through `attend`, layer by layer.

        `context` is the most tokens that the text may have, of which these are a part: RoPE may depend on it.
        `caps_scores` declares that `attend` caps scores by the configuration's `score_cap`, without which a model that
        has one raises NotImplementedError.

        With `rematerialize`, a gradient keeps only each layer's input and computes the layer again: less memory, a
        third more time. In training, the devices of `token_mesh` share the tokens. `by_row`, such as `RowGroups.apply`,
        computes everything but attention.
        """
        config = self.config
        if config.score_cap is not None and not caps_scores:
            raise NotImplementedError(
                f"this {config.family} model caps the scores of attention, which this method does not: generate with "
                "it, or compare full attention and head patterns"
            )
        embedded = self.whole(self.embed, tokens)(tokens)
        if config.embed_scale != 1:  # Rounded to the data type of the embeddings, as by transformers.
            embedded = embedded * jnp.asarray(config.embed_scale, embedded.dtype)
        x = constrain(embedded, self.mesh, "data")
        ropes = [config.layer_rope(index, context) for index in range(len(self.layers))]
        scale = self._query_scale(positions)
        angles_of = {
            rope: Angles(*rotation(rope, config.rope_dim, positions), scale) for rope in dict.fromkeys(ropes) if rope
        }
        for index, layer in enumerate(self.layers):
            rope = ropes[index]
            angles = None if rope is None else angles_of[rope]
            plain = functools.partial(self._layer, layer, index, attend, token_mesh, by_row)
            with jax.named_scope(f"layer_{index}"):
                x, state = self._kept(plain, rematerialize)(x, angles, state)
                x = constrain(x, self.mesh, "data")
        return by_row(self.norm, x), state

    def _query_scale(self, positions: Int32[Array, "B T"]) -> Float[Array, "B T 1 1"] | None:
        """What queries are multiplied by at each position; None: nothing."""
        config = self.config
        if not config.query_log_scale:
            return None
        periods = jax.lax.div(positions, jnp.full_like(positions, config.query_log_positions)).astype(jnp.float32)
        return (1 + config.query_log_scale * jnp.log1p(periods))[:, :, None, None]

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token logits in float32. Pass only the positions you need: `[T, V]` of a long prompt is large."""
        with jax.named_scope("head"):
            tied = self.config.tied_head
            stored = self.whole(self.embed, hidden).embedding if tied else self.whole(self.head, hidden).kernel
            weight = stored.get_value()
            if self.config.embed_dtype is not None:
                logits = multiply(hidden, weight, input_axis=int(tied), dtype=jnp.dtype("float32"))
            elif self.is_by_output:
                logits = by_output(hidden, weight, jnp.float32)
            else:
                logits = jnp.matmul(hidden, weight.T if tied else weight, preferred_element_type=jnp.float32)
            logits = logits if self.config.logits_divisor == 1 else logits / self.config.logits_divisor
            cap = self.config.logits_cap
            return logits if cap is None else cap * jnp.tanh(logits / cap)

    def sink_logits(self, layer: int) -> Float[Array, "N"] | None:
        """The score of each query head of a layer for its learned sink, for the operations of attention."""
        return self.layers[layer].attention.sink_logits.get_value() if self.config.sink_logits else None

    def whole(self, part: Part, inputs: Array) -> Part:
        """A part of the decoder with all of its weights, from the slices of all devices, once `inputs` are computed.

        Without that condition the compiler could gather all layers at once. Weights are frozen: no gradient is summed.
        """
        if self.sliced is None:
            return part
        graphdef, params = nnx.split(part)
        params, _ = jax.lax.optimization_barrier(jax.lax.stop_gradient((params, inputs)))
        return nnx.merge(graphdef, constrain(params, self.sliced))

    def _layer(
        self,
        layer: Layer,
        index: int,
        attend: Attend[State],
        token_mesh: AnyMesh | None,
        by_row: ByRow,
        x: Array,
        angles: Angles | None,
        state: State,
    ) -> tuple[Array, State]:
        return self.whole(layer, x)(x, angles, attend, state, index, token_mesh, by_row)

    def _kept(self, layer: Callable[..., Any], rematerialize: bool) -> Callable[..., Any]:
        """A layer with what a gradient keeps of it: never gathered weights, which would be those of all layers."""
        # Quantized weights would be kept in the data type in which they are multiplied.
        if rematerialize or (self.sliced is not None and self.config.weight_dtype is not None):
            return jax.checkpoint(layer)
        if self.sliced is None:
            return layer
        return jax.checkpoint(layer, policy=lambda operation, *_, **settings: operation.name not in GATHERING)


def abstract_decoder(config: ModelConfig, mesh: AnyMesh | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder's static part and its parameters as shapes: nothing is allocated.

    Layers are alike, with experts or without: one of each kind is traced, in a tenth of the time of tracing all.
    """
    kinds = [config.has_experts(layer) for layer in range(config.num_layers)]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    dtype = jnp.dtype(config.dtype)
    decoder = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0), mesh=mesh, layers=first))
    traced = {kinds[number]: layer for number, layer in zip(first, decoder.layers, strict=True)}
    decoder.layers = nnx.List([nnx.clone(traced[kind]) for kind in kinds])
    return nnx.split(decoder)


def check_size(config: ModelConfig, arrays: int | None = None, source: str = "the model") -> None:
    """Check that a model can exist, before it is traced or allocated.

    Args:
        config: its configuration.
        arrays: number of arrays that its files have.
        source: what to call it.

    Raises:
        ValueError: more layers than arrays, or weights that exceed all memory of a host without an accelerator.
    """
    if arrays is not None and config.num_layers > arrays:
        raise ValueError(f"{source}: its configuration has {config.num_layers} layers, its files only {arrays} arrays")
    quantized = config.weight_dtype is not None or config.embed_dtype is not None
    least = config.num_parameters // 2 if quantized else config.num_parameters * jnp.dtype(config.dtype).itemsize
    total = host_total() if jax.default_backend() == "cpu" else None
    if total is not None and least > total:
        raise ValueError(
            f"{source} has {config.num_parameters} weights, which take {size_text(least)} in {config.dtype}, and this "
            f"machine has {size_text(total)} of memory: choose a smaller model, dtype or weight_dtype"
        )


@pytree.register(arrays=("params", "order"), static=("config", "graphdef", "mesh"))
@dataclass(frozen=True)
class Model:
    """A decoder's weights as a pytree: `params` are its leaves, everything else is static under jit.

    On a mesh, `order` is the KV head of each column of a head table (see `balance`); caches must have the same order.
    On a mesh without it, devices have slices of the weights and no heads of their own, for training (`mesh.fsdp`).
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    mesh: Mesh | None = None
    order: Int32[Array, "L C"] | None = None

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        *,
        seed: int = 0,
        dtype: AnyDtype | None = None,
        weight_dtype: AnyDtype | None = None,
        embed_dtype: AnyDtype | None = None,
    ) -> "Model":
        """A model with random weights, for tests and benchmarks; data types default to the configuration's."""
        config = config.with_dtypes(dtype=dtype, weight_dtype=weight_dtype, embed_dtype=embed_dtype)
        check_size(config)
        return cls.from_decoder(Decoder(config, dtype=jnp.dtype(config.dtype), rngs=nnx.Rngs(seed)))

    @classmethod
    def from_decoder(cls, decoder: Decoder) -> "Model":
        """Split a module into its static part and its weights."""
        graphdef, params = nnx.split(decoder)
        return cls(decoder.config, graphdef, params)

    @property
    def is_fsdp(self) -> bool:
        """Whether every device has a slice of each array: a model to train with, not for inference."""
        return self.mesh is not None and self.order is None

    @property
    def decoder(self) -> Decoder:
        """The module, merged from its parts: cheap, and meant to be used inside a jitted function."""
        decoder = nnx.merge(self.graphdef, self.params)
        decoder.sliced = self.mesh if self.is_fsdp else None
        return decoder

    def by_output(self, *, donate: bool = False) -> "Model":
        """This model with linear maps stored `[out, in]`, in which a CPU multiplies a few rows faster; see `linear`.

        For a model that `is_plain`. With `donate`, this one is not usable afterwards, and there is no second copy.
        """
        # Merged with `self.params`, the decoder would share its variables.
        decoder = nnx.merge(self.graphdef, jax.tree.map(lambda x: x, self.params))
        if decoder.is_by_output:
            return self
        decoder.is_by_output = True
        for _, part in nnx.iter_modules(decoder):
            if isinstance(part, Linear):
                part.is_by_output = True
                stored = part.kernel.get_value()
                part.kernel.set_value(stored.T.block_until_ready())
                if donate:
                    stored.delete()
        graphdef, params = nnx.split(decoder)
        return replace(self, graphdef=graphdef, params=params)

    @property
    def is_plain(self) -> bool:
        """Whether all weights have the data type of the activations, on one device, and none are those of experts."""
        config = self.config
        formats = config.weight_dtype or config.embed_dtype
        return self.mesh is None and formats is None and not any(map(config.has_experts, range(config.num_layers)))

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of activations, and of weights that are not quantized."""
        return jnp.dtype(self.config.dtype)

    @property
    def fingerprint(self) -> str:
        """A cheap hash that identifies the weights: every tensor's name, shape, data type, first and last row."""
        digest, is_by_output = hashlib.blake2b(digest_size=16), self.decoder.is_by_output
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            name, shape = jax.tree_util.keystr(path), leaf.shape
            is_turned = is_by_output and "'kernel'" in name  # Hashed as if it were not.
            digest.update(f"{name} {shape[::-1] if is_turned else shape} {leaf.dtype.name}".encode())
            if is_turned:
                leaf = leaf[:, jnp.array([0, -1])].T
            ends = ((end,) * max(1, leaf.ndim - 1) for end in (0, -1))
            for row in [leaf[end] for end in ends] if leaf.ndim else [leaf]:
                digest.update(np.asarray(row).tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return nbytes(self.params)
