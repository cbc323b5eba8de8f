"""Numbers that are not finite: the error that ends a generation or a score, and JSON without them. Knows no model."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def not_finite(where: str, dtype: Any) -> FloatingPointError:
    """The error for logits or scores that are NaN or infinite, with the likely cause for this data type."""
    if np.dtype(dtype) == np.float16:
        cause = "numbers above 65504 overflow in float16: load the model with dtype bfloat16 or float32"
    else:
        cause = (
            "the weights may have NaN or infinite values (check the checkpoint), or the cache overflowed in a function "
            "that you compiled with jax.jit"
        )
    return FloatingPointError(f"{where} not finite; {cause}")


def check_finite(where: str, values: Any, dtype: Any) -> None:
    """Check that log-probabilities or scores are finite.

    Args:
        where: the beginning of the message, such as "step 3: the logits are".
        values: numbers of any shape.
        dtype: the model's data type, by which the message names the likely cause.

    Raises:
        FloatingPointError: there is NaN or infinity.
    """
    if not np.isfinite(np.asarray(values, np.float64)).all():
        raise not_finite(where, dtype)


def json_text(record: Any, *, ensure_ascii: bool = True, indent: int | None = None) -> str:
    """JSON, in one line unless `indent` is given; a number that is not finite, which JSON lacks, becomes null."""
    return json.dumps(_finite(record), ensure_ascii=ensure_ascii, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
