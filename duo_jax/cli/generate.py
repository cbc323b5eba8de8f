"""`duo generate`: text in, text out, with timings and memory."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from duo_jax.arguments import whole_number
from duo_jax.cache import store
from duo_jax.cache.cache import KVCache
from duo_jax.certified import inference
from duo_jax.checkpoint.fingerprint import weights_fingerprint
from duo_jax.checkpoint.open import open_config
from duo_jax.cli.answers import Answers
from duo_jax.cli.batch import BatchOptions, PromptRow, answer, batches, encode_rows, filled, fingerprint, read_rows
from duo_jax.cli.devices import DeviceOptions, ProcessOptions
from duo_jax.cli.options import CacheOptions, ModelOptions, PatternOptions, RoomOptions, SamplingOptions
from duo_jax.cli.prompt import PromptOptions
from duo_jax.cli.timings import Timings, show_status
from duo_jax.files import check_output, locked
from duo_jax.finite import json_text
from duo_jax.generation.chunks import cache_room, chunk_width
from duo_jax.generation.sampling import Sampler
from duo_jax.model.model import Model
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.plan import Plan
from duo_jax.text import template
from duo_jax.text.lm import LM, TextStream
from pallas_kernels.types import Request


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a pretrained model, with full attention or with streaming heads."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    prompt: tyro.conf.OmitArgPrefixes[PromptOptions] = PromptOptions()
    batch: tyro.conf.OmitArgPrefixes[BatchOptions] = BatchOptions()
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

    def requests(self) -> list[Request] | None:
        """The attention over a saved cache, for certification: it has its own pattern and data types."""
        if (before := self._saved()) is None:
            return None
        config = open_config(self.model.model).with_dtypes(dtype=self.model.dtype)
        return inference(config, store.pattern_of(before), kv_dtype=before["dtypes"][0])

    def run(self) -> None:
        """Check the flags, load, generate and report; of several processes, only the first prints."""
        self.processes.join({name: value for name, value in asdict(self).items() if name != "processes"})
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        if self.batch.prompts is not None or self.batch.out is not None:
            self._answer_file()
            return
        with self.processes.only_first_prints():
            self._run()

    def _run(self) -> None:
        mesh = self.devices.make()
        if mesh is not None and self.cache is not None:
            raise ValueError("a saved cache is for one device: leave out --mesh or --cache")
        prompt, sampler, before = self.prompt.text(), self.sampling.sampler(), self._saved()
        if self.pattern.kv_budget is None:
            self.pattern.load(1)  # Reject a bad pattern before loading the model.
        tokenizer = self.model.text_tokenizer()
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

    def _answer_file(self) -> None:
        """Answer the prompts of a file that have no answer yet, in batches."""
        prompts, out = self.batch.files()
        if self.prompt.is_given:
            raise ValueError("--prompts replaces --prompt, --prompt-file and -: leave them out")
        if self.cache is not None:
            raise ValueError("--cache continues one text: leave it out, or give one --prompt")
        if self.processes.distributed:
            raise ValueError("--prompts runs in one process: leave out --distributed, or divide the file")
        mesh, sampler, rows = self.devices.make(), self.sampling.sampler(), read_rows(prompts)
        check_output(out)
        if self.pattern.kv_budget is None:
            self.pattern.load(1)
        tokenizer = self.model.text_tokenizer()
        template.start(tokenizer)
        encoded = encode_rows(rows, self.prompt, tokenizer)
        longest = max(len(row.tokens) for row in encoded)
        pattern = self.pattern.load(longest + self.max_new_tokens)
        count = self._rows_at_a_time(len(rows))
        plan = self.model.plan(pattern, chunk_width(longest, rows=count), self.devices.size)
        plan = replace(plan, kv_dtype=self.kv.kv_dtype, batch_size=count)
        room = self.room.tokens(plan, longest + self.max_new_tokens)
        with locked(out):
            answers = Answers.open(out, self._head(plan, encoded), len(rows))
            missing = [row for row in encoded if row.index not in answers.lines]
            if missing:
                lm = LM(self.model.load(mesh=mesh, pattern=pattern), tokenizer, pattern, self.kv.kv_dtype)
                try:
                    self._answer(lm, sampler, missing, answers, plan.batch_size, room)
                except KeyboardInterrupt:
                    print(f"\n{out}: stopped; run the same command again to resume", file=sys.stderr)
                    raise
            answers.finish()
        record = {"out": str(out), "answers": len(rows), "new": len(missing)}
        print(json_text(record) if self.json else f"{out}: {len(rows)} answers, {len(missing)} of them new")

    def _rows_at_a_time(self, count: int) -> int:
        """The size of every batch of a file of prompts: as many as the devices can share."""
        shares = self.devices.size.data
        return -(-min(self.batch.batch_size, count) // shares) * shares

    def _head(self, plan: Plan, rows: Sequence[PromptRow]) -> dict[str, Any]:
        """What must be the same when a file of answers is resumed: all that decides the answers."""
        config, pattern = plan.config, plan.pattern
        about = {
            "task": "generate",
            "model": self.model.model,
            "dtype": config.dtype,
            "weight_dtype": config.weight_dtype,
            "embed_dtype": config.embed_dtype,
            "kv_dtype": plan.kv_dtype,
            "max_new_tokens": self.max_new_tokens,
            "sampling": asdict(self.sampling),
            "pattern": asdict(self.pattern),
        }
        contents = {"prompts": fingerprint(rows), "weights": weights_fingerprint(self.model.model)}
        if pattern is not None:
            heads = f"{pattern.sink_size} {pattern.recent_size} {pattern.is_retrieval.tolist()}"
            contents["pattern"] = hashlib.sha256(heads.encode()).hexdigest()[:16]
        return {"about": about, "contents": contents}

    def _answer(
        self, lm: LM, sampler: Sampler, rows: Sequence[PromptRow], answers: Answers, size: int, room: int
    ) -> None:
        """Answer prompts in batches of `size`, and append each to the file."""
        answers.begin()
        done = len(answers.lines)
        with tqdm(desc="prompts", total=done + len(rows), initial=done, unit="prompt", dynamic_ncols=True) as bar:
            for batch in batches(rows, size):
                whole = filled(batch, size)
                longest = cache_room(len(whole[0].tokens) + self.max_new_tokens, size)
                length = longest if self.room.max_context is None else room
                replies = lm.complete(
                    [row.tokens.tolist() for row in whole],
                    rows=[row.index for row in whole],
                    cache=lm.make_cache(length, size),
                    max_new_tokens=self.max_new_tokens,
                    sampler=sampler,
                    seed=self.sampling.seed,
                    stop=self.sampling.stop,
                )
                answers.add([answer(row, reply) for row, reply in zip(batch, replies, strict=False)])
                bar.update(len(batch))

    def _saved(self) -> dict[str, Any] | None:
        """The description of a saved cache, without its keys and values."""
        if self.cache is None:
            return None
        about = store.read_about(self.cache)
        if about["tokens"] is None or len(about["tokens"]) != 1:
            raise ValueError(f"{self.cache} is not one text with its tokens: write one with duo prefill")
        return about

    def _cache(self, model: Model, pattern: HeadPattern | None, room: int) -> KVCache:
        dtype, room = self.kv.kv_dtype, model.config.room(room)
        if self.cache is None:
            return KVCache.init(model.config, pattern, 1, room, dtype=dtype, mesh=model.mesh)
        return KVCache.load(self.cache, model, pattern=pattern, dtype=dtype, max_length=room)


def _summary(record: dict[str, int | float]) -> str:
    small = record["kv_bytes"] > record["kv_bytes_full"]
    line = (
        "prompt {prompt_tokens} tokens in {prefill_seconds:.2f} s ({prefill_tokens_per_second:.0f}/s), "
        "{new_tokens} new at {decode_tokens_per_second:.1f}/s, compiling {compile_seconds:.1f} s; KV cache {kv} MB, "
        "full attention {full} MB"
    ).format(**record, kv=f"{record['kv_bytes'] / 1e6:.1f}", full=f"{record['kv_bytes_full'] / 1e6:.1f}")
    return f"{line}: the text is shorter than the windows of streaming heads" if small else line
