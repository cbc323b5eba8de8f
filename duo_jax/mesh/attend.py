"""Attention on a mesh: every device attends with its own rows and heads, over its own part of the cache."""

from collections.abc import Callable
from itertools import compress
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from duo_jax.cache.cache import KVCache
from duo_jax.layers import Attend

# (cache, layer, q, k, v, a value for each row [B]) -> attention output and the new cache, on one device.
AttendOnDevice: TypeAlias = Callable[[KVCache, int, Array, Array, Array, Array], tuple[Array, KVCache]]


def on_devices(attend: AttendOnDevice, of_row: Array) -> Attend[KVCache]:
    """`attend` for the model's layers, run by every device on its part; `of_row [B]` is its last argument."""

    def attend_on_mesh(cache: KVCache, layer: int, q: Array, k: Array, v: Array) -> tuple[Array, KVCache]:
        mesh = cache.mesh
        if mesh is None:
            return attend(cache, layer, q, k, v, of_row)
        arrays, structure = jax.tree.flatten(cache)
        specs = cache.axes()
        # An empty pool cannot be an argument of shard_map: the compiler of jax 0.11 crashes. Each device makes its own.
        is_passed = [array.size > 0 for array in arrays]
        shapes = [NamedSharding(mesh, spec).shard_shape(x.shape) for x, spec in zip(arrays, specs, strict=True)]

        def attend_on_device(
            passed: list[Array], q: Array, k: Array, v: Array, of_row: Array
        ) -> tuple[Array, list[Array]]:
            rest, sizes = iter(passed), zip(is_passed, arrays, shapes, strict=True)
            own = [next(rest) if given else jnp.zeros(shape, array.dtype) for given, array, shape in sizes]
            out, new = attend(jax.tree.unflatten(structure, own), layer, q, k, v, of_row)
            return out, list(compress(jax.tree.leaves(new), is_passed))

        heads, passed_specs = PartitionSpec("data", None, "tensor"), list(compress(specs, is_passed))
        out, new = jax.shard_map(
            attend_on_device,
            mesh=mesh,
            in_specs=(passed_specs, heads, heads, heads, PartitionSpec("data")),
            out_specs=(heads, passed_specs),
            check_vma=False,
        )(list(compress(arrays, is_passed)), q, k, v, of_row)
        changed = iter(new)
        merged = [next(changed) if given else array for given, array in zip(is_passed, arrays, strict=True)]
        return out, jax.tree.unflatten(structure, merged)

    return attend_on_mesh
