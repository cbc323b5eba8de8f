"""Time and memory of a generation, phase by phase, and the status line that shows its progress."""

import sys
import time
from collections.abc import Callable

from duo_jax.cache.cache import KVCache
from duo_jax.model.config import ModelConfig

_is_shown = False


def show_status(text: str) -> None:
    """Show the current activity in place, if standard error is a terminal; "" removes it, and nothing else."""
    global _is_shown
    if sys.stderr.isatty() and (text or _is_shown):
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        _is_shown = bool(text)


class Phases:
    """Seconds of the phases of streams, which call `watch`; `status` receives each activity."""

    def __init__(self, status: Callable[[str], None] = show_status) -> None:
        self.new_tokens = 0
        self.seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
        self._status, self._phase, self._since = status, "", 0.0

    def watch(self, phase: str | None) -> None:
        """Count the time since the last call as that of the phase that ends now; see `Watch`."""
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] += now - self._since
        if phase == "compile":
            self._status("compiling")
        elif self._phase == "prefill":
            self._status("decoding")
        self.new_tokens += phase == "decode"
        self._phase, self._since = phase or "", now

    @property
    def rate(self) -> float:
        """Tokens a second, the prompt and compilation not counted."""
        return self.new_tokens / self.seconds["decode"] if self.seconds["decode"] else 0.0


class Timings(Phases):
    """Tokens, seconds and bytes of one stream, which calls `watch` and `progress`.

    Begin it before the stream, with the stream's cache of one row.
    """

    def __init__(
        self, config: ModelConfig, cache: KVCache, prompt_tokens: int, status: Callable[[str], None] = show_status
    ) -> None:
        super().__init__(status)
        self.prompt_tokens = prompt_tokens
        self.kv_bytes, self.kv_bytes_full = cache.nbytes, KVCache.bytes_for(config, None, 1, cache.max_length)

    def progress(self, done: int) -> None:
        """Show how many tokens of the prompt have been computed."""
        self._status(f"prefill {done}/{self.prompt_tokens} tokens")

    def record(self) -> dict[str, int | float]:
        """All numbers by name."""
        tokens = {"prefill": self.prompt_tokens, "decode": self.new_tokens}
        rates = {name: count / self.seconds[name] if self.seconds[name] else 0.0 for name, count in tokens.items()}
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            **{f"{name}_seconds": seconds for name, seconds in self.seconds.items()},
            "kv_bytes": self.kv_bytes,
            "kv_bytes_full": self.kv_bytes_full,
            **{f"{name}_tokens_per_second": rate for name, rate in rates.items()},
        }
