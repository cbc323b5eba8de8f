"""The attention that a model will run, for certification before jax takes the GPU; knows no kernels.

`pallas_kernels.certify` checks it in a process of its own and keeps verdicts. Without a GPU nothing is checked.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from duo_jax.arguments import whole_number
from duo_jax.checkpoint.open import open_config
from duo_jax.mesh.mesh import MeshSize
from duo_jax.mesh.processes import is_shared, share_verdicts
from duo_jax.model.config import ModelConfig
from duo_jax.model.precision import AnyDtype, Precision
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.plan import any_pattern
from pallas_kernels import Window
from pallas_kernels.certify import certify as certify_requests
from pallas_kernels.certify import check_settings
from pallas_kernels.certify.machine import may_have_gpu
from pallas_kernels.quantized import BITS
from pallas_kernels.segments import can_be_short
from pallas_kernels.types import Request

# Streaming heads of a training run whose window is not known yet: the paper's.
TRAINING_WINDOW = Window(128, 256)

# Shapes of models of which a caller has asked for what will run.
_asked: set[tuple[int, int, str]] = set()


def inference(
    config: ModelConfig,
    *patterns: HeadPattern | None,
    kv_dtype: AnyDtype | None = None,
    mesh: MeshSize = MeshSize(),
    page_size: int | None = None,
) -> list[Request]:
    """Prefill, of short chunks too, decode and the write of its token, of a model with each of some patterns.

    None is full attention. A server's cache has pages of `page_size` tokens.

    Raises:
        ValueError: a mesh whose devices cannot share the model.
    """
    mesh.check(config)
    precision = Precision(config.dtype, kv_dtype=kv_dtype)
    requests = []
    for pattern in patterns:
        chosen = HeadPattern.full(config) if pattern is None else pattern.of(config)
        # The window of the layers with full attention, and those of the others, in which all heads stream.
        windows = {chosen.window: chosen.num_streaming > 0} if config.full_layers else {}
        windows |= dict.fromkeys(config.own_windows, True)
        for window, has_ring in windows.items():
            sizes: dict[str, Any] = {
                "window": window,
                "full": precision.kv if chosen.num_retrieval else None,
                "ring": precision.streaming if has_ring else None,
                "page": page_size,
                "score_cap": config.score_cap,
                "is_sharded": mesh.sequence > 1,
                # More devices than KV heads share the queries of one.
                "group": config.num_heads // mesh.kv_heads(config),
            }
            requests += [_request(config, name, **sizes) for name in ("prefill", "decode")]
            if sizes["full"] in BITS and can_be_short(config.dtype, config.head_dim):
                requests.append(_request(config, "prefill", is_short=True, **sizes))
            requests.append(_request(config, "append", **sizes | {"group": 1, "score_cap": None}))
    return requests


def training(config: ModelConfig, window: Window = TRAINING_WINDOW, mesh: MeshSize = MeshSize()) -> list[Request]:
    """Full attention, that of streaming heads and that of layers with a window, forward and backward."""
    # More devices than KV heads share the queries of one.
    group = max(1, config.num_heads // max(config.num_kv_heads, mesh.sequence))
    windows = dict.fromkeys((None, window, *config.own_windows))
    return [_request(config, "training", group=group, window=each) for each in windows]


def certify(
    source: str | Path,
    pattern: HeadPattern | None = None,
    *,
    dtype: AnyDtype | None = None,
    kv_dtype: AnyDtype | None = None,
    mesh: Mesh | None = None,
    page_size: int | None = None,
    full: bool = False,
) -> None:
    """Check the attention backends that a model will use on this GPU, unless verdicts exist; on a CPU, nothing happens.

    `load` does this. Call it before `load_model`, which does not know the pattern and the cache: it checks full
    attention and the windows that most patterns have.

    Args:
        source: the model, as for `load_model`; its weights are not read.
        pattern: which heads will stream; None: full attention.
        dtype: data type of the weights, by default the checkpoint's.
        kv_dtype: data type of the cache, the model's by default.
        mesh: devices that will share model and cache.
        page_size: tokens of a page, of a cache that will have pages.
        full: check again what has a verdict, for up to half an hour instead of two minutes.

    Raises:
        ValueError: another value of DUO_CERTIFY than 0, 1 and full; an unknown DUO_BACKEND, a pattern of another model,
            or a page without tokens.
    """
    config = open_config(source).with_dtypes(dtype=dtype)
    if pattern is not None:
        pattern.check(config)
    if page_size is not None:
        whole_number("page_size", page_size, 1)
    requests = inference(config, pattern, kv_dtype=kv_dtype, mesh=MeshSize.of(mesh), page_size=page_size)
    certify_model(config, requests, mesh=mesh, full=full)


def certify_model(
    config: ModelConfig,
    requests: Iterable[Request] | None = None,
    *,
    pattern: HeadPattern | None = None,
    mesh: Mesh | None = None,
    trains: bool = False,
    full: bool = False,
) -> None:
    """Find the missing verdicts on a model's attention; processes that share a mesh then agree on the first one's.

    Without requests, for a model whose cache is not known yet: a cache of the model's data type, with the pattern, or
    with full attention and with the usual window; nothing if a caller who knew has asked before.

    Raises:
        ValueError: see `certify`.
    """
    asked = None if requests is None else list(requests)
    check_settings(asked or ())
    if may_have_gpu():
        if asked is None and _shape(config) not in _asked:
            patterns = (None, any_pattern(config, 0.5)) if pattern is None else (pattern,)
            size = MeshSize.of(mesh)
            usual = training(config, mesh=size) if trains else inference(config, *patterns, mesh=size)
            certify_requests(usual, full=full)
        elif asked:
            certify_requests(asked, full=full)
            _asked.add(_shape(config))
    if mesh is not None and is_shared(mesh):
        share_verdicts()


def _shape(config: ModelConfig) -> tuple[int, int, str]:
    return config.head_dim, config.num_heads // config.num_kv_heads, str(config.dtype)


def _request(config: ModelConfig, operation: str, *, group: int, **fields: Any) -> Request:
    return Request.of(operation, q=str(config.dtype), head_dim=config.head_dim, group=group, **fields)
