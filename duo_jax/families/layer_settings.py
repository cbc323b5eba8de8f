"""What differs from layer to layer, from the settings of a Hugging Face configuration: windows, RoPE, experts."""

from collections.abc import Mapping
from typing import Any

from duo_jax.families.table import FAMILIES

FULL, SLIDING = "full_attention", "sliding_attention"
# Families with a window in every layer or in none: transformers does not read their `layer_types`.
UNIFORM = {"mistral", "ministral3", "mixtral", "phi3", "qwen3_moe"}


def layer_fields(family: str, values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `layer_windows` and `dense_layers` of `ModelConfig`; `no_rope_layers` is only checked.

    Args:
        family: a name in `FAMILIES`.
        values: the settings after all defaults.
        given: the settings that the configuration has.

    Raises:
        NotImplementedError: layers of another type, or windows in a family that has none.
        ValueError: lists that contradict the number of layers or other settings.
    """
    if "no_rope_layers" in FAMILIES[family]:
        _check_no_rope(values["no_rope_layers"], values["num_hidden_layers"])
    return {"layer_windows": _layer_windows(family, values, given), "dense_layers": _dense_layers(values)}


def _layer_windows(family: str, values: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer, as in `ModelConfig`; empty if no layer has one."""
    layers, window, kinds = values["num_hidden_layers"], values["sliding_window"] or None, values["layer_types"]
    kinds = [SLIDING if window else FULL] * layers if kinds is None else kinds
    if not isinstance(kinds, list | tuple) or len(kinds) != layers or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"layer_types must be a list with the type of each of {layers} layers, got {kinds!r:.80}")
    if others := sorted(set(kinds) - {SLIDING, FULL}):
        raise NotImplementedError(f"{family}: this model uses layers of type {others!s:.80}, which is not supported")
    sliding = [layer for layer, kind in enumerate(kinds) if kind == SLIDING]
    if sliding and not window:
        raise ValueError(
            f"layer_types has {SLIDING} in layers {sliding!s:.60}, but there is no window: sliding_window is "
            f"{given.get('sliding_window')}, use_sliding_window {given.get('use_sliding_window')}"
        )
    first = 0 if family in UNIFORM else given.get("max_window_layers")
    if window and first is not None and sliding != [*range(first, layers)]:
        raise ValueError(
            f"layer_types has {SLIDING} in layers {sliding!s:.60}, but a {family} model with {window=} has it in all "
            f"layers from {first} on"
        )
    # A window as large as the trained context has no effect, unless RoPE goes by it.
    has_no_effect = window and window >= values["max_position_embeddings"] and "window_rope" not in FAMILIES[family]
    if not sliding or has_no_effect:
        return ()
    if "layer_windows" not in FAMILIES[family]:
        raise NotImplementedError(f"{family}: this model uses {SLIDING} ({window=}), which is not supported")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _check_no_rope(flags: Any, layers: int) -> None:
    """Check SmolLM3's list, which has 1 for a layer with RoPE."""
    if not isinstance(flags, list | tuple) or len(flags) != layers or not all(flag in (0, 1) for flag in flags):
        raise ValueError(f"no_rope_layers must be a list with 0 or 1 for each of {layers} layers, got {flags!r:.80}")


def _dense_layers(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers of a model with experts that have none, by `mlp_only_layers` and `decoder_sparse_step`."""
    listed, step = values["mlp_only_layers"] or [], values["decoder_sparse_step"] or 1
    if not isinstance(listed, list | tuple) or not all(type(layer) is int for layer in listed):
        raise ValueError(f"mlp_only_layers must be a list of layers, got {listed!r:.80}")
    return tuple(layer for layer in range(values["num_hidden_layers"]) if layer in listed or (layer + 1) % step)
