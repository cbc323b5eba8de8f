"""Merging attention over parts of the keys, which several devices hold, by their log-sum-exp. Knows no pools."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.types import Partial


def merge(part: Partial, axis: str, dtype: jnp.dtype) -> Float[Array, "*rows H"]:
    """Attention over all keys, from every device's part of them (Dao 2023, section 3.1); in `dtype`.

    What is sent has the size of the output, whatever the number of keys. Devices that all have the same keys have the
    same weight, and their mean is what each has.
    """
    most = lax.pmax(part.log_sum, axis)
    weight = jnp.exp(part.log_sum - most)
    # One message: the weights beside what they weigh.
    weighed = jnp.concatenate([part.out.astype(jnp.float32) * weight[..., None], weight[..., None]], axis=-1)
    total = lax.psum(weighed, axis)
    return (total[..., :-1] / total[..., -1:]).astype(dtype)
