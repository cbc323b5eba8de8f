"""`duo generate`: text in, text out, and what it took."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from transformers import PreTrainedTokenizerBase

from duo_jax.cli.options import CacheOptions, ModelOptions, PatternOptions, SamplingOptions
from duo_jax.cli.timed import Timings, timed_stream
from duo_jax.detokenize import Detokenizer


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a pretrained model, with full attention or with streaming heads."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    stdin: tyro.conf.Positional[Literal["-"] | None] = None
    """`-` reads the prompt from standard input."""
    prompt: str | None = None
    """The prompt itself."""
    prompt_file: Path | None = None
    """A UTF-8 file with the prompt."""
    chat: bool = False
    """Wrap the prompt in the model's chat template, as one user message."""
    max_new_tokens: int = 128
    """Most tokens generated."""
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    cache: tyro.conf.OmitArgPrefixes[CacheOptions] = CacheOptions()
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions()
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Check the flags, load, generate, report."""
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        prompt, sampler = self._prompt(), self.sampling.sampler()
        if self.pattern.kv_budget is None:
            self.pattern.load(1)  # A wrong pattern is told before the model is loaded.
        tokenizer = self.model.tokenizer()
        tokens = _encode(tokenizer, prompt, chat=self.chat)
        pattern = self.pattern.load(len(tokens) + self.max_new_tokens)
        model = self.model.load()
        timings, text, ids, logprobs = Timings(), Detokenizer(tokenizer, self.sampling.stop), [], []
        steps = timed_stream(
            model,
            tokens,
            timings,
            pattern=pattern,
            kv_dtype=self.cache.kv_dtype,
            max_new_tokens=self.max_new_tokens,
            sampler=sampler,
            eos_ids=model.config.eos_ids,
            key=self.sampling.seed,
            status=_status,
        )
        for token, logprob in steps:
            ids.append(token)
            logprobs.append(logprob)
            new = "" if token in model.config.eos_ids else text.add(token)
            if not self.json:
                _status("")
                print(new, end="", flush=True)
            if text.stopped:
                break
        _status("")
        if self.json:
            print(json.dumps(_record(text.text, ids, logprobs, timings), ensure_ascii=False))
        else:
            print(text.rest())
            print(_summary(timings), file=sys.stderr)

    def _prompt(self) -> str:
        given = [self.stdin is not None, self.prompt is not None, self.prompt_file is not None]
        if sum(given) != 1:
            raise ValueError("give the prompt once: --prompt TEXT, --prompt-file FILE, or - for standard input")
        try:
            if self.prompt_file is not None:
                text = self.prompt_file.read_text(encoding="utf-8")
            else:
                text = sys.stdin.read() if self.prompt is None else self.prompt
            text.encode("utf-8")  # The shell's own bytes arrive as lone surrogates, which no tokenizer takes.
        except UnicodeError as error:
            raise ValueError(f"{self.prompt_file or 'the prompt'} is not UTF-8 text: {error}") from None
        if not text:
            raise ValueError("the prompt is empty; give at least one character")
        return text


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> np.ndarray:
    if chat and not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template: leave --chat out")
    if chat:
        message = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt has no tokens; give more than special characters")
    return np.asarray(ids, np.int32)


def _record(text: str, tokens: list[int], logprobs: list[float], timings: Timings) -> dict:
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    numbers = asdict(timings) | {name: getattr(timings, name) for name in rates}
    return {"text": text, "tokens": tokens, "logprobs": logprobs, **numbers}


def _summary(timings: Timings) -> str:
    return (
        f"prompt {timings.prompt_tokens} tokens in {timings.prefill_seconds:.2f} s "
        f"({timings.prefill_tokens_per_second:.0f}/s), {timings.new_tokens} new at "
        f"{timings.decode_tokens_per_second:.1f}/s, compiling {timings.compile_seconds:.1f} s; KV cache "
        f"{timings.kv_bytes / 1e6:.1f} MB, full attention {timings.kv_bytes_full / 1e6:.1f} MB"
    )


def _status(text: str) -> None:
    """Show what is going on, in place, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
