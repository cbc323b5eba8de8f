"""HeadPattern: which KV heads keep a full cache. Host data only: gates, a boolean table, and their files.

The unit is the KV head, per layer: a pattern is a `[layers, kv_heads]` table (paper section 2). Layers with a window of
their own have no head that could retrieve; neither sparsity nor budgets count them.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from duo_jax.arguments import MOST_TOKENS, instance, path_of, real_number, whole_number
from duo_jax.files import write_text
from duo_jax.model.config import ModelConfig
from duo_jax.pattern.files import (
    CONFIG_FILE,
    DEFAULT_RULE,
    GATES_FILE,
    check_folder,
    find_folder,
    read_file,
    read_gates,
)
from duo_jax.reading import parse_object
from pallas_kernels.window import Window

# In `config.json`: the layers with a window of their own, if there are any.
WINDOW_LAYERS = "window_layers"


@dataclass(frozen=True, eq=False)
class HeadPattern:
    """Head types of one model, and the sizes of a streaming head's cache.

    Attributes:
        is_retrieval: True where a KV head keeps every token.
        sink_size: first tokens that a streaming head keeps.
        recent_size: most recent tokens that a streaming head keeps, the query's own included.
        gates: the trained gates as loaded, unclipped.
        metadata: the contents of `config.json`, such as where the gates come from.
        window_layers: layers with a window of their own, which have no retrieval head.
    """

    is_retrieval: Bool[np.ndarray, "L K"]
    sink_size: int
    recent_size: int
    gates: Float[np.ndarray, "L K"]
    metadata: dict = field(default_factory=dict)
    window_layers: tuple[int, ...] = ()
    # The text that was loaded: an unchanged pattern is saved with the same bytes.
    _config_text: str | None = None
    # The rule by which `from_gates` chose.
    _rule: tuple[tuple[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        """Check the table and the sizes."""
        for name in ("is_retrieval", "gates"):
            instance(name, getattr(self, name), np.ndarray, "HeadPattern.from_gates makes a pattern of any table")
        if self.is_retrieval.ndim != 2 or self.gates.shape != self.is_retrieval.shape:
            shapes = f"{self.is_retrieval.shape=}, {self.gates.shape=}"
            raise ValueError(f"a pattern is a table [layers, kv_heads] with a gate for each head, got {shapes}")
        object.__setattr__(self, "window_layers", _check_layers(self.window_layers, self.num_layers))
        if self.is_retrieval[list(self.window_layers)].any():
            raise ValueError(f"layers {self.window_layers} have a window of their own, and so no retrieval head")
        if self.num_streaming or (self.sink_size, self.recent_size) != (0, 0):
            _check_sizes(self.sink_size, self.recent_size)

    def __eq__(self, other: object) -> bool:
        """Two patterns are equal if they serve the same heads in the same way."""
        return (
            isinstance(other, HeadPattern)
            and np.array_equal(self.is_retrieval, other.is_retrieval)
            and (self.sink_size, self.recent_size) == (other.sink_size, other.recent_size)
            and self.window_layers == other.window_layers
        )

    def __hash__(self) -> int:
        """Equal patterns have equal hashes."""
        sizes = self.sink_size, self.recent_size, self.window_layers
        return hash((self.is_retrieval.tobytes(), self.is_retrieval.shape, *sizes))

    @property
    def num_layers(self) -> int:
        """Rows of the table."""
        return self.is_retrieval.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Columns of the table."""
        return self.is_retrieval.shape[1]

    @property
    def num_retrieval(self) -> int:
        """KV heads that keep every token, over all layers."""
        return int(self.is_retrieval.sum())

    @property
    def num_choosable(self) -> int:
        """KV heads that can be of either type: those of layers without a window of their own."""
        return (self.num_layers - len(self.window_layers)) * self.num_kv_heads

    @property
    def num_streaming(self) -> int:
        """KV heads that keep sinks and the recent window only, over all layers without a window of their own."""
        return self.num_choosable - self.num_retrieval

    @property
    def window(self) -> Window:
        """The window of a streaming head."""
        return Window(int(self.sink_size), int(self.recent_size))

    @property
    def sparsity(self) -> float:
        """Fraction of the KV heads that can choose that are streaming heads."""
        return self.num_streaming / max(1, self.num_choosable)

    @property
    def shown_gates(self) -> Float[np.ndarray, "L K"]:
        """The gates in [0, 1], and NaN in layers with a window of their own."""
        gates = self.gates.clip(0, 1)
        gates[list(self.window_layers)] = np.nan
        return gates

    def kv_fraction(self, context_length: int) -> float:
        """KV tokens kept at `context_length`, as a fraction of what full attention keeps, in heads that can choose.

        Raises:
            ValueError: a length below 1.
        """
        context_length = whole_number("context_length", context_length, 1)
        streaming = min(context_length, self.window.size)
        kept = self.num_retrieval * context_length + self.num_streaming * streaming
        return kept / (self.num_choosable * context_length) if self.num_choosable else 1.0

    @classmethod
    def full(cls, config: ModelConfig) -> "HeadPattern":
        """No chosen streaming head: every KV head is a retrieval head, but for layers with a window of their own."""
        gates = np.ones((config.num_layers, config.num_kv_heads))
        gates[list(config.window_layers)] = 0
        return cls(gates > 0, sink_size=0, recent_size=0, gates=gates, window_layers=config.window_layers)

    @classmethod
    def from_gates(
        cls,
        gates: ArrayLike,
        *,
        sink_size: int,
        recent_size: int,
        sparsity: float | None = None,
        threshold: float | None = None,
        kv_budget: float | None = None,
        context_length: int | None = None,
        metadata: dict | None = None,
        window_layers: Sequence[int] = (),
    ) -> "HeadPattern":
        """Choose the retrieval heads: those with the largest gates (paper section 2.3).

        Exactly one rule applies; without any it is `threshold=0.5`. Gates beyond 0 and 1 are in order too: how far
        beyond says how early and firmly a gate was decided. Ties are broken by (gate, kv head, layer), so the same
        gates give the same pattern on every machine.

        Args:
            gates: one per KV head, `[layers, kv_heads]`; kept as given.
            sink_size: first tokens that a streaming head keeps.
            recent_size: most recent tokens that a streaming head keeps.
            sparsity: fraction of KV heads that become streaming heads, over all layers without a window of their own,
                rounded down to whole heads.
            threshold: heads with a gate of at least this are retrieval heads.
            kv_budget: fraction of full attention's KV tokens that may be kept at `context_length`.
            context_length: tokens; for `kv_budget` only.
            metadata: anything worth keeping in `config.json`.
            window_layers: layers with a window of their own, whose rows of `gates` are ignored.

        Raises:
            ValueError: gates that are not a finite table, more than one rule, or a rule that cannot be met.
        """
        _check_sizes(sink_size, recent_size)
        gates = np.asarray(gates)
        is_real = np.issubdtype(gates.dtype, np.number) and not np.issubdtype(gates.dtype, np.complexfloating)
        if gates.ndim != 2 or not gates.size or not is_real:
            raise ValueError(
                f"gates must be a table [layers, kv_heads] of real numbers, got {gates.dtype}{gates.shape}"
            )
        gates = gates.astype(np.float64)
        _check_finite(gates, "gates")
        rules = {"sparsity": sparsity, "threshold": threshold, "kv_budget": kv_budget}
        given = {name: value for name, value in rules.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"give one of sparsity, threshold and kv_budget, got {given}")
        for name, value in given.items():
            real_number(name, value, 0, 1)
        if (kv_budget is None) != (context_length is None):
            raise ValueError(f"kv_budget and context_length go together, got {kv_budget=}, {context_length=}")
        window_layers = _check_layers(window_layers, len(gates))
        chooses = np.ones(len(gates), bool)
        chooses[list(window_layers)] = False
        own = gates[chooses]
        if sparsity is not None:
            # The tolerance keeps 0.7 * 10 at 7.
            retrieves = _largest(own, own.size - int(sparsity * own.size + 1e-9))
        elif kv_budget is not None and context_length is not None:
            capacity = sink_size + recent_size
            retrieves = _largest(own, _affordable(own.size, kv_budget, context_length, capacity))
        else:
            retrieves = own.clip(0.0, 1.0) >= (0.5 if threshold is None else threshold)
        is_retrieval = np.zeros(gates.shape, bool)
        is_retrieval[chooses] = retrieves
        rule = tuple({**given, "context_length": context_length}.items())
        return cls(is_retrieval, sink_size, recent_size, gates, metadata or {}, window_layers, _rule=rule)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        kv_budget: float | None = None,
        context_length: int | None = None,
        sink_size: int | None = None,
        recent_size: int | None = None,
    ) -> "HeadPattern":
        """Load a folder with `full_attention_heads.tsv` and `config.json`, or a published pattern by name.

        `sink_size` and `recent_size` override the ones in `config.json`; the rules are those of `from_gates`. Without a
        rule, the `default_sparsity` of `config.json` applies if there is one, such as `duo choose --apply` writes.

        Raises:
            FileNotFoundError: no such folder or name; the message lists the names.
            ValueError: files that are not a pattern, or a rule that cannot be met.
        """
        folder = find_folder(source)
        config_text = read_file(folder / CONFIG_FILE)
        metadata = parse_object(config_text, folder / CONFIG_FILE)
        sizes: dict[str, Any] = {"sink_size": sink_size, "recent_size": recent_size}
        for name, override in sizes.items():
            if override is None and name not in metadata:
                raise ValueError(f"{folder / CONFIG_FILE} has no {name!r}; add it or pass {name}=")
            sizes[name] = metadata[name] if override is None else override
        overrides = sink_size is not None or recent_size is not None
        rules: dict[str, Any] = {"sparsity": sparsity, "threshold": threshold, "kv_budget": kv_budget}
        try:
            _check_sizes(**sizes)
        except ValueError as error:
            raise error if overrides else ValueError(f"{folder / CONFIG_FILE}: {error}") from None
        if all(rule is None for rule in rules.values()) and DEFAULT_RULE in metadata:
            try:
                rules["sparsity"] = real_number(DEFAULT_RULE, metadata[DEFAULT_RULE], 0, 1)
            except ValueError as error:
                raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
        gates = read_gates(folder / GATES_FILE)
        _check_finite(gates, f"{folder / GATES_FILE}: gates")
        layers: Any = metadata.get(WINDOW_LAYERS, ())
        try:
            layers = _check_layers(layers, len(gates))
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
        pattern = cls.from_gates(
            gates, **sizes, **rules, context_length=context_length, metadata=metadata, window_layers=layers
        )
        object.__setattr__(pattern, "_config_text", config_text)
        return pattern

    def save(self, folder: str | Path) -> None:
        """Write `full_attention_heads.tsv` (raw gates) and `config.json`, in the published patterns' format.

        Raises:
            FileExistsError: the folder has another `config.json`, such as a model's.
            OSError: it cannot be written.
        """
        folder = path_of("folder", folder)
        check_folder(folder)
        sizes = {"sink_size": int(self.sink_size), "recent_size": int(self.recent_size)}
        text, metadata = self._config_text, self.metadata | sizes
        metadata |= {WINDOW_LAYERS: list(self.window_layers)} if self.window_layers else {}
        if text is None or json.loads(text) != metadata:
            text = json.dumps(metadata, indent=1) + "\n"
        rows = io.StringIO()
        np.savetxt(rows, self.gates, delimiter="\t")
        write_text(folder / CONFIG_FILE, text)
        write_text(folder / GATES_FILE, rows.getvalue())

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError if this pattern is of another model."""
        self.of(config)

    def of(self, config: ModelConfig) -> "HeadPattern":
        """This pattern with the window layers of its model, which files of other programs do not name.

        Raises:
            ValueError: a pattern of another model.
        """
        if self.is_retrieval.shape != (config.num_layers, config.num_kv_heads):
            raise ValueError(
                f"the pattern has {self.num_layers} layers x {self.num_kv_heads} KV heads, the model "
                f"{config.num_layers} x {config.num_kv_heads}: it was made for another model"
            )
        own = config.window_layers
        if self.window_layers == own:
            return self
        # Without a rule the table was given, with one the gates.
        decided = self.is_retrieval if self._rule is None else self.gates > 0
        if self.window_layers or decided[list(own)].any():
            layers = [layer for layer in range(self.num_layers) if layer not in self.window_layers]
            raise ValueError(
                f"the pattern chooses heads in {len(layers)} layers, {layers!s:.60}, but the model has full attention "
                f"in {len(config.full_layers)}, {[*config.full_layers]!s:.60}: it was made for another model"
            )
        if self._rule is None:
            return replace(self, window_layers=own)
        sizes: dict[str, Any] = {"sink_size": self.sink_size, "recent_size": self.recent_size}
        chosen = HeadPattern.from_gates(
            self.gates, **sizes, **dict(self._rule), metadata=self.metadata, window_layers=own
        )
        return replace(chosen, _config_text=self._config_text)


def _check_layers(layers: Any, count: int) -> tuple[int, ...]:
    """Indices of layers in order, as Python integers."""
    if not isinstance(layers, list | tuple):
        raise ValueError(f"{WINDOW_LAYERS} must be a list of layers, got {layers!r:.60}")
    return tuple(sorted({whole_number(f"a layer of {WINDOW_LAYERS}", layer, 0, count - 1) for layer in layers}))


def _check_sizes(sink_size: Any, recent_size: Any) -> None:
    total = whole_number("sink_size", sink_size, 0) + whole_number("recent_size", recent_size, 1)
    if total > MOST_TOKENS:
        raise ValueError(f"sink_size + recent_size must be at most {MOST_TOKENS}, got {total}")


def _check_finite(gates: np.ndarray, name: str) -> None:
    if not np.isfinite(gates).all():
        bad = [tuple(int(i) for i in index) for index in np.argwhere(~np.isfinite(gates))[:3]]
        raise ValueError(f"{name} must be finite, got NaN or infinity at (layer, kv head) {bad}; train them again")


def _largest(gates: np.ndarray, count: int) -> np.ndarray:
    """Mark the `count` largest gates; ties go to the higher KV head, then to the higher layer."""
    layers, heads = np.indices(gates.shape)
    ascending = np.lexsort((layers.ravel(), heads.ravel(), gates.ravel()))
    chosen = np.zeros(gates.size, bool)
    chosen[ascending[gates.size - count :]] = True
    return chosen.reshape(gates.shape)


def _affordable(num_heads: int, budget: float, context_length: int, capacity: int) -> int:
    """The most retrieval heads whose KV tokens, with those of the streaming heads, are within the budget."""
    context_length = whole_number("context_length", context_length, 1)
    streaming = min(capacity, context_length)
    least = streaming / context_length
    if budget < least:
        raise ValueError(
            f"kv_budget={budget} at {context_length=} is less than {least:.4f}, which streaming heads keep already: "
            "raise it, or lower sink_size + recent_size"
        )
    if streaming == context_length:
        return num_heads
    return int(num_heads * (budget * context_length - streaming) / (context_length - streaming) + 1e-9)
