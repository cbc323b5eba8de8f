"""`duo generate`: text in, text out, with timings and memory."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from duo_jax.arguments import whole_number
from duo_jax.cache import store
from duo_jax.cache.cache import KVCache
from duo_jax.chunks import chunk_width
from duo_jax.cli.devices import DeviceOptions, ProcessOptions
from duo_jax.cli.options import CacheOptions, ModelOptions, PatternOptions, RoomOptions, SamplingOptions
from duo_jax.cli.prompt import PromptOptions
from duo_jax.cli.timings import Timings, show_status
from duo_jax.finite import json_text
from duo_jax.model import Model
from duo_jax.pattern import HeadPattern
from duo_jax.text import template
from duo_jax.text.lm import LM, TextStream


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a pretrained model, with full attention or with streaming heads."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    prompt: tyro.conf.OmitArgPrefixes[PromptOptions] = PromptOptions()
    cache: Path | None = None
    """A folder written by duo prefill: the prompt continues its text. It contains the head pattern and data types."""
    max_new_tokens: int = 128
    """Most tokens generated."""
    room: tyro.conf.OmitArgPrefixes[RoomOptions] = RoomOptions()
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    kv: tyro.conf.OmitArgPrefixes[CacheOptions] = CacheOptions()
    devices: tyro.conf.OmitArgPrefixes[DeviceOptions] = DeviceOptions()
    processes: tyro.conf.OmitArgPrefixes[ProcessOptions] = ProcessOptions()
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions()
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Check the flags, load, generate and report; of several processes, only the first prints."""
        self.processes.join({name: value for name, value in asdict(self).items() if name != "processes"})
        with self.processes.only_first_prints():
            self._run()

    def _run(self) -> None:
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        mesh = self.devices.make()
        if mesh is not None and self.cache is not None:
            raise ValueError("a saved cache is for one device: leave out --mesh or --cache")
        prompt, sampler, before = self.prompt.text(), self.sampling.sampler(), self._saved()
        if self.pattern.kv_budget is None:
            self.pattern.load(1)  # Reject a bad pattern before loading the model.
        tokenizer = self.model.tokenizer()
        template.start(tokenizer)
        history = None if before is None else np.asarray(before["tokens"][0], np.int32)
        if before is None or history is None:
            tokens = self.prompt.encode(tokenizer, prompt)
        else:
            tokens = self.prompt.encode_question(tokenizer, prompt, history, before.get("text"))
        needed = len(tokens) + self.max_new_tokens + (0 if history is None else len(history))
        pattern = self.pattern.load(needed)
        served = pattern if before is None else store.pattern_of(before)
        plan = self.model.plan(served, chunk_width(len(tokens)), self.devices.size)
        room = self.room.tokens(replace(plan, kv_dtype=before["dtypes"][0] if before else self.kv.kv_dtype), needed)
        model = self.model.load(mesh=mesh, pattern=pattern)
        cache = self._cache(model, pattern, room)
        timings = Timings(model.config, cache, len(tokens))
        running = TextStream(
            LM(model, tokenizer),
            [tokens.tolist()],
            cache=cache,
            history=() if history is None else history.tolist(),
            max_new_tokens=self.max_new_tokens,
            sampler=sampler,
            seed=self.sampling.seed,
            stop=self.sampling.stop,
            progress=timings.progress,
            watch=timings.watch,
        )
        for piece in running:
            if not self.json:
                show_status("")
                print(piece, end="", flush=True)
        show_status("")
        if self.json:
            reply = running.reply
            record = {"text": reply, "tokens": reply.tokens, "logprobs": reply.logprobs, **timings.record()}
            print(json_text(record, ensure_ascii=False))
        else:
            print()
            print(_summary(timings.record()), file=sys.stderr)

    def _saved(self) -> dict[str, Any] | None:
        """The description of a saved cache, without its keys and values."""
        if self.cache is None:
            return None
        about = store.read_about(self.cache)
        if about["tokens"] is None or len(about["tokens"]) != 1:
            raise ValueError(f"{self.cache} is not one text with its tokens: write one with duo prefill")
        return about

    def _cache(self, model: Model, pattern: HeadPattern | None, room: int) -> KVCache:
        dtype = self.kv.kv_dtype
        if self.cache is None:
            return KVCache.init(model.config, pattern, 1, room, dtype=dtype, mesh=model.mesh)
        return KVCache.load(self.cache, model, pattern=pattern, dtype=dtype, max_length=room)


def _summary(record: dict[str, int | float]) -> str:
    return (
        "prompt {prompt_tokens} tokens in {prefill_seconds:.2f} s ({prefill_tokens_per_second:.0f}/s), "
        "{new_tokens} new at {decode_tokens_per_second:.1f}/s, compiling {compile_seconds:.1f} s; KV cache {kv} MB, "
        "full attention {full} MB"
    ).format(**record, kv=f"{record['kv_bytes'] / 1e6:.1f}", full=f"{record['kv_bytes_full'] / 1e6:.1f}")
