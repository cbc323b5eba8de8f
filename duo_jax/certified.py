"""The attention that a model will run, for certification before jax takes the GPU; knows no kernels.

`pallas_kernels.certify` checks it in a process of its own and keeps verdicts. Without a GPU nothing here does anything.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from duo_jax.config import ModelConfig
from duo_jax.mesh.mesh import MeshSize
from duo_jax.mesh.processes import gather
from duo_jax.pattern import HeadPattern
from duo_jax.precision import AnyDtype, Precision
from pallas_kernels import Window
from pallas_kernels.certify import certify, verdicts
from pallas_kernels.certify.machine import may_have_gpu
from pallas_kernels.types import Request

# Of a pattern that is not known yet: that of the published ones.
USUAL_WINDOW = Window(64, 256)

# Shapes of models that a caller who knew the pattern and the cache has asked for.
_asked: set[tuple[int, int, str]] = set()


def inference(
    config: ModelConfig,
    pattern: HeadPattern | Window | None = None,
    *,
    kv_dtype: AnyDtype | None = None,
    mesh: MeshSize = MeshSize(),
) -> list[Request]:
    """Prefill and decode of a model whose heads stream as a pattern says, or with a window."""
    window, has_full, has_ring = Window(0, 0), True, False
    if isinstance(pattern, Window):
        window, has_ring = pattern, True
    elif pattern is not None:
        window, has_full = pattern.window, bool(pattern.is_retrieval.any())
        has_ring = pattern.num_streaming > 0
    precision = Precision(config.dtype, kv_dtype=kv_dtype)
    full, ring = precision.kv if has_full else None, precision.streaming if has_ring else None
    shared = mesh.sequence > 1
    return [_request(config, name, window, full=full, ring=ring, is_sharded=shared) for name in ("prefill", "decode")]


def training(config: ModelConfig, window: Window) -> list[Request]:
    """Full attention and that of streaming heads, forward and backward."""
    return [_request(config, "training", None), _request(config, "training", window)]


def certify_model(config: ModelConfig, requests: Iterable[Request] | None = None, *, full: bool = False) -> None:
    """Find the missing verdicts on a model's attention.

    Without requests, for a model whose pattern and cache are not known yet: full attention, and the usual window; not
    if a caller who knew them has asked before. Of several processes, all then use the verdicts of the first one.

    Raises:
        ValueError: another value of DUO_CERTIFY than 0, 1 and full.
    """
    if not may_have_gpu():
        return
    shape = config.head_dim, config.num_heads // config.num_kv_heads, str(config.dtype)
    if requests is not None:
        certify(requests, full=full)
        _asked.add(shape)
    elif shape not in _asked:
        certify([*inference(config), *inference(config, USUAL_WINDOW)], full=full)
    if jax.distributed.is_initialized():
        share()


def share() -> None:
    """Use the first process's verdicts in all of them, which must run the same program; all call this together."""
    text = json.dumps(verdicts.known().to_json()).encode()
    counts = gather([len(text)])
    rows = gather(list(text.ljust(max(row[0] for row in counts))))
    verdicts.use(verdicts.Found.from_json(json.loads(bytes(rows[0]))))


def _request(config: ModelConfig, operation: str, window: Window | None, **fields: Any) -> Request:
    sizes: dict[str, Any] = {
        "head_dim": config.head_dim,
        "group": config.num_heads // config.num_kv_heads,
        "window": window,
    }
    return Request.of(operation, q=str(config.dtype), **sizes, **fields)


def certify_command(requests: Sequence[Request]) -> None:
    """Find the missing verdicts on what a command will run; later, its models are loaded without further ones."""
    certify(requests)
    for request in requests:
        _asked.add((request.head_dim, request.group, request.q))
