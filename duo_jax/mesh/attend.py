"""Attention with a cache: on a mesh, every device attends with its own rows and heads, over its part of the cache.

In a quantized cache, channels of keys have an order of their own, in which those that may be large come first.
"""

from collections.abc import Callable
from itertools import compress
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from duo_jax.cache.cache import KVCache
from duo_jax.model.layer import Attend
from duo_jax.model.model import Decoder

# (cache, layer, q, k, v, a value for each row [B], sink logits) -> attention output and the new cache, on one device.
AttendOnDevice: TypeAlias = Callable[[KVCache, int, Array, Array, Array, Array, Array | None], tuple[Array, KVCache]]


def on_devices(attend: AttendOnDevice, of_row: Array, decoder: Decoder) -> Attend[KVCache]:
    """`attend` for the decoder's layers, run by every device on its part of the arrays and of `of_row [B]`."""

    def attend_on_mesh(cache: KVCache, layer: int, q: Array, k: Array, v: Array) -> tuple[Array, KVCache]:
        mesh, sinks = cache.mesh, decoder.sink_logits(layer)
        order = decoder.layers[layer].attention.key_channels() if cache.is_quantized else None
        if mesh is None:
            return attend(cache, layer, _in_order(q, order), _in_order(k, order), v, of_row, sinks)
        arrays, structure = jax.tree.flatten(cache)
        specs = cache.axes()
        # An empty pool cannot be an argument of shard_map: the compiler of jax 0.11 crashes. Each device makes its own.
        is_passed = [array.size > 0 for array in arrays]
        shapes = [NamedSharding(mesh, spec).shard_shape(x.shape) for x, spec in zip(arrays, specs, strict=True)]

        def attend_on_device(
            passed: list[Array],
            q: Array,
            k: Array,
            v: Array,
            of_row: Array,
            order: Array | None,
            sinks: Array | None,
        ) -> tuple[Array, list[Array]]:
            rest, sizes = iter(passed), zip(is_passed, arrays, shapes, strict=True)
            own = [next(rest) if given else jnp.zeros(shape, array.dtype) for given, array, shape in sizes]
            part = jax.tree.unflatten(structure, own)
            out, new = attend(part, layer, _in_order(q, order), _in_order(k, order), v, of_row, sinks)
            return out, list(compress(jax.tree.leaves(new), is_passed))

        heads, passed_specs = PartitionSpec("data", None, "tensor"), list(compress(specs, is_passed))
        rows, of_heads = PartitionSpec("data"), PartitionSpec("tensor")
        out, new = jax.shard_map(
            attend_on_device,
            mesh=mesh,
            in_specs=(passed_specs, heads, heads, heads, rows, of_heads, of_heads),
            out_specs=(heads, passed_specs),
            check_vma=False,
        )(list(compress(arrays, is_passed)), q, k, v, of_row, order, sinks)
        changed = iter(new)
        merged = [next(changed) if given else array for given, array in zip(is_passed, arrays, strict=True)]
        return out, jax.tree.unflatten(structure, merged)

    return attend_on_mesh


def _in_order(x: Float[Array, "B T N H"], order: Int32[Array, "K H"] | None) -> Float[Array, "B T N H"]:
    """Channels of queries or keys in the order of their KV head."""
    if order is None:
        return x
    index = jnp.repeat(order, x.shape[2] // len(order), axis=0, total_repeat_length=x.shape[2])
    return jnp.take_along_axis(x, index[None, None], axis=3)
