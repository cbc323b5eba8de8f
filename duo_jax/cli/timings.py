"""What a generation took, phase by phase, and the status line that shows its progress."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from duo_jax.cache.cache import KVCache
from duo_jax.config import ModelConfig


@dataclass
class Timings:
    """Tokens, seconds and bytes of one stream, whose `watch` is `Watcher.watch`."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv_bytes: int = 0
    kv_bytes_full: int = 0

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode rate."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prefill rate."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0


class Watcher:
    """Fills in `Timings` as the `watch` and `progress` of a stream; `status` receives a text as the phases change."""

    def __init__(self, config: ModelConfig, cache: KVCache, prompt_tokens: int, status: Callable[[str], None]) -> None:
        """Begin before the stream, with its cache of one row."""
        full = KVCache.bytes_for(config, None, 1, cache.max_length)
        self.timings = Timings(prompt_tokens, kv_bytes=cache.nbytes, kv_bytes_full=full)
        self._status = status
        self._phase: str | None = None
        self._since = 0.0

    def watch(self, phase: Literal["compile", "prefill", "decode"] | None) -> None:
        """Count the time since the last call as that of the phase that ends now."""
        now, timings = time.perf_counter(), self.timings
        if self._phase is not None:
            name = f"{self._phase}_seconds"
            setattr(timings, name, getattr(timings, name) + now - self._since)
        if phase == "compile":
            self._status("compiling")
        elif self._phase == "prefill":
            self._status("decoding")
        timings.new_tokens += phase == "decode"
        self._phase, self._since = phase, now

    def progress(self, done: int) -> None:
        """Show how many tokens of the prompt have been computed."""
        self._status(f"prefill {done}/{self.timings.prompt_tokens} tokens")


def show_status(text: str) -> None:
    """Show the current activity in place, if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
