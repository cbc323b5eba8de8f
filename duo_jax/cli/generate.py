"""`duo generate`: text in, text out, and what it took."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from transformers import PreTrainedTokenizerBase

from duo_jax.checkpoint import load_model, load_tokenizer
from duo_jax.cli.text import Detokenizer
from duo_jax.cli.timed import Timings, timed_stream
from duo_jax.pattern import HeadPattern
from duo_jax.sampling import Categorical, Greedy, MinP, RepetitionPenalty, Sampler, Temperature, TopK, TopP, Transform


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a pretrained model, with full attention or with streaming heads."""

    model: str
    """Hugging Face folder, .gguf file, packaged model (smollm2-135m-instruct) or hub id."""
    stdin: tyro.conf.Positional[Literal["-"] | None] = None
    """`-` reads the prompt from standard input."""
    prompt: str | None = None
    """The prompt itself."""
    prompt_file: Path | None = None
    """A UTF-8 file with the prompt."""
    chat: bool = False
    """Wrap the prompt in the model's chat template, as one user message."""
    pattern: str | None = None
    """Head pattern: a published name or a folder; without it every head keeps all tokens (full attention)."""
    sparsity: float | None = None
    """Fraction of KV heads that stream, 0 to 1; needs --pattern."""
    threshold: float | None = None
    """Heads with a gate of at least this keep all tokens; needs --pattern."""
    kv_budget: float | None = None
    """Fraction of full attention's KV tokens to keep at the prompt's length; needs --pattern."""
    sink_size: int | None = None
    """First tokens that streaming heads keep; the pattern's own by default."""
    recent_size: int | None = None
    """Most recent tokens that streaming heads keep; the pattern's own by default."""
    max_new_tokens: int = 128
    """Most tokens generated."""
    temperature: float = 0.0
    """0 takes the most likely token; above, tokens are drawn at random."""
    top_k: int | None = None
    """Draw from the k most likely tokens only."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities sum to p."""
    min_p: float | None = None
    """Draw from tokens at least p times as likely as the likeliest."""
    repetition_penalty: float | None = None
    """Above 1, tokens seen before become less likely."""
    seed: int = 0
    """Seed of the random draws."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of weights and cache; the checkpoint's own by default, float32 on a CPU."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Check the flags, load, generate, report."""
        prompt, sampler = self._prompt(), self.sampler()
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if self.pattern is None and any(value is not None for value in self._pattern_options().values()):
            raise ValueError("--sparsity, --threshold, --kv-budget, --sink-size and --recent-size need --pattern")
        if self.kv_budget is None:
            self._load_pattern(1)  # A wrong pattern is told before the model is loaded.
        tokenizer = load_tokenizer(self.model)
        tokens = _encode(tokenizer, prompt, chat=self.chat)
        pattern = self._load_pattern(len(tokens))
        model = load_model(self.model, dtype=self.dtype)
        timings, text, ids, logprobs = Timings(), Detokenizer(tokenizer), [], []
        steps = timed_stream(
            model,
            tokens,
            timings,
            pattern=pattern,
            max_new_tokens=self.max_new_tokens,
            sampler=sampler,
            eos_ids=model.config.eos_ids,
            key=self.seed,
            status=_status,
        )
        for token, logprob in steps:
            new = text.add(token)
            ids.append(token)
            logprobs.append(logprob)
            if not self.json:
                _status("")
                print(new, end="", flush=True)
        _status("")
        if self.json:
            print(json.dumps(_record(text.text, ids, logprobs, timings), ensure_ascii=False))
        else:
            print(text.rest())
            print(_summary(timings), file=sys.stderr)

    def sampler(self) -> Sampler:
        """The flags as a sampler."""
        transforms: list[Transform] = []
        if self.repetition_penalty is not None:
            transforms.append(RepetitionPenalty(self.repetition_penalty))
        cuts: list[Transform] = [TopK(self.top_k)] if self.top_k is not None else []
        cuts += [TopP(self.top_p)] if self.top_p is not None else []
        cuts += [MinP(self.min_p)] if self.min_p is not None else []
        if self.temperature != 0:
            return Categorical((*transforms, Temperature(self.temperature), *cuts))
        if cuts:
            raise ValueError("--top-k, --top-p and --min-p choose among random draws: give a --temperature above 0")
        return Greedy(tuple(transforms))

    def _prompt(self) -> str:
        given = [self.stdin is not None, self.prompt is not None, self.prompt_file is not None]
        if sum(given) != 1:
            raise ValueError("give the prompt once: --prompt TEXT, --prompt-file FILE, or - for standard input")
        if self.prompt_file is not None:
            try:
                text = self.prompt_file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.prompt_file} is not UTF-8 text: {error}") from None
        else:
            text = sys.stdin.read() if self.prompt is None else self.prompt
        if not text:
            raise ValueError("the prompt is empty; give at least one character")
        return text

    def _pattern_options(self) -> dict[str, Any]:
        names = ("sparsity", "threshold", "kv_budget", "sink_size", "recent_size")
        return {name: getattr(self, name) for name in names}

    def _load_pattern(self, prompt_tokens: int) -> HeadPattern | None:
        if self.pattern is None:
            return None
        context = None if self.kv_budget is None else prompt_tokens + self.max_new_tokens
        return HeadPattern.load(self.pattern, context_length=context, **self._pattern_options())


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> np.ndarray:
    if chat and not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template: leave --chat out")
    if chat:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
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
