"""`duo prefill`: compute the KV cache of a long text once and save it, for many questions by `duo generate --cache`."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from duo_jax.arguments import whole_number
from duo_jax.cache.cache import KVCache
from duo_jax.cli.options import CacheOptions, ModelOptions, PatternOptions, RoomOptions
from duo_jax.cli.prompt import PromptOptions
from duo_jax.cli.timings import show_status
from duo_jax.files import free_path
from duo_jax.finite import json_text
from duo_jax.generation.chunks import chunk_width
from duo_jax.generation.infer import prefill


@dataclass(frozen=True)
class Prefill:
    """Compute the KV cache of a text once and save it, for many questions with duo generate --cache."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    out: Path
    """Folder to write; it must not exist yet."""
    prompt: tyro.conf.OmitArgPrefixes[PromptOptions] = PromptOptions()
    chunk: int | None = None
    """Tokens computed at a time; by default chosen by the text's length."""
    room: tyro.conf.OmitArgPrefixes[RoomOptions] = RoomOptions()
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    kv: tyro.conf.OmitArgPrefixes[CacheOptions] = CacheOptions()
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Check the flags, load, prefill, write and report."""
        free_path(self.out)
        if self.chunk is not None:
            whole_number("chunk", self.chunk, 1)
        text = self.prompt.text()
        tokens = self.prompt.encode_document(self.model.text_tokenizer(), text)
        length, width = len(tokens), chunk_width(len(tokens), self.chunk)
        pattern = self.pattern.load(length)
        plan = replace(self.model.plan(pattern, width), kv_dtype=self.kv.kv_dtype)
        room = self.room.tokens(plan, length)
        model = self.model.load(pattern=pattern)
        cache = KVCache.init(model.config, pattern, 1, model.config.room(room), dtype=self.kv.kv_dtype)
        begin = time.perf_counter()
        _, cache = prefill(
            model,
            tokens[None],
            cache,
            chunk_size=width,
            progress=lambda done: show_status(f"prefill {done}/{length} tokens"),
        )
        cache.length.block_until_ready()
        seconds = time.perf_counter() - begin
        show_status("writing")
        cache.save(self.out, model, tokens=tokens[None], text=text)
        size = sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file())
        show_status("")
        record = {"out": str(self.out), "tokens": length, "prefill_seconds": seconds, "bytes": size}
        summary = f"{length} tokens in {seconds:.1f} s, compilation included; {size / 1e6:.1f} MB in {self.out}"
        print(json_text(record) if self.json else summary)
