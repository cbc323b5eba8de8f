"""Precision: the data types of activations, weights and KV cache as one value. Every name is listed here, once."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np

from duo_jax.arguments import ArgumentError

# A data type: its name, or numpy's or jax's object for it.
AnyDtype: TypeAlias = str | type | np.dtype

FloatDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
# Few bits (`weights.py`): w8a8 quantizes activations too, int4-32 has a scale for every 32 channels, asym has the
# number that stands for 0 too, fp8 has 8-bit floats, mxfp4 is for experts only.
WeightDtype: TypeAlias = Literal[
    "int8",
    "w8a8",
    "int4",
    "int4-32",
    "int4-128",
    "int4-asym",
    "int4-32-asym",
    "int4-128-asym",
    "int8-128",
    "fp8",
    "fp8-128",
    "mxfp4",
]
# Embeddings are looked up, not multiplied: there are no activations to quantize.
EmbedDtype: TypeAlias = Literal["int8", "int4", "int4-32", "int4-128"]
# Asymmetric integers (`pallas_kernels.quantized`).
KvDtype: TypeAlias = Literal["float32", "bfloat16", "float16", "int8", "int4"]


@dataclass(frozen=True)
class Precision:
    """The data types that a model is computed and stored in; fields take names, and numpy's or jax's data types.

    Attributes:
        dtype: activations, and every weight and cache entry that no other field covers.
        weight_dtype: linear maps of the layers; None: `dtype`.
        embed_dtype: embeddings and head; None: `dtype`.
        kv_dtype: KV cache of retrieval heads; None: `dtype`.
        streaming_dtype: KV cache of streaming heads, which is small; None: `kv_dtype`, or `dtype` where that is int8 or
            int4.

    Raises:
        ValueError: a name that the field does not allow.
    """

    dtype: AnyDtype
    weight_dtype: AnyDtype | None = None
    embed_dtype: AnyDtype | None = None
    kv_dtype: AnyDtype | None = None
    streaming_dtype: AnyDtype | None = None

    def __post_init__(self) -> None:
        """Replace data types by their names, and check them."""
        for field, allowed in ALLOWED.items():
            value = getattr(self, field)
            if value is not None or field == "dtype":
                object.__setattr__(self, field, check_name(field, value, allowed))

    @property
    def kv(self) -> str:
        """Data type of the KV cache of retrieval heads."""
        return str(self.dtype if self.kv_dtype is None else self.kv_dtype)

    @property
    def streaming(self) -> str:
        """Data type of the KV cache of streaming heads."""
        if self.streaming_dtype is not None:
            return str(self.streaming_dtype)
        return self.kv if self.kv in get_args(FloatDtype) else str(self.dtype)


ALLOWED: dict[str, tuple[str, ...]] = {
    "dtype": get_args(FloatDtype),
    "weight_dtype": get_args(WeightDtype),
    "embed_dtype": get_args(EmbedDtype),
    "kv_dtype": get_args(KvDtype),
    "streaming_dtype": get_args(KvDtype),
}


def name_of(dtype: AnyDtype) -> str:
    """The name of a data type: of `jnp.bfloat16`, `np.dtype("bfloat16")` or `"bfloat16"`, "bfloat16".

    Raises:
        ValueError: no data type.
    """
    if isinstance(dtype, str):
        return dtype
    try:
        # numpy would take None for float64, and an array for its own data type.
        return jnp.dtype(dtype).name if isinstance(dtype, type | np.dtype) else _refuse(dtype)
    except TypeError:
        return _refuse(dtype)


def _refuse(dtype: object) -> NoReturn:
    raise ValueError(f"a data type is a name such as 'bfloat16', or jnp.bfloat16, got {dtype!r:.60}")


def check_name(field: str, dtype: AnyDtype, allowed: Iterable[str]) -> str:
    """The name of a data type.

    Raises:
        ValueError: one that is not allowed.
    """
    try:
        name = name_of(dtype)
    except ValueError as error:
        raise ArgumentError(field, f"must be one of {', '.join(allowed)}: {error}") from None
    if name not in allowed:
        raise ArgumentError(field, f"must be one of {', '.join(allowed)}, got {name!r:.60}")
    return name
