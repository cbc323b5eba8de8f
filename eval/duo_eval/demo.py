"""`duo demo`: one question about a long text, with full attention, with a head pattern, with streaming heads only."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from duo_train.data.haystack import DEFAULT, load_haystack
from jaxtyping import Int32
from rich.console import Console
from rich.status import Status
from rich.table import Table

from duo_eval.tasks.needle.insert import insert_needle
from duo_eval.tasks.needle.styles import digits
from duo_jax import HeadPattern, load_model, load_tokenizer
from duo_jax.arguments import whole_number
from duo_jax.certified import inference
from duo_jax.checkpoint.open import open_config
from duo_jax.cli.timings import Timings
from duo_jax.generation.chunks import cache_room
from duo_jax.text.lm import LM, TextStream
from duo_jax.text.tokens import encode
from pallas_kernels.types import Request


@dataclass(frozen=True)
class Demo:
    """Hide a passkey in a long real text and ask for it with full attention, a pattern, and streaming heads only."""

    model: str = "smollm2-135m-instruct"
    """Hugging Face folder, .gguf file, packaged model or hub id."""
    pattern: str = "smollm2-135m-instruct"
    """Head pattern: a published name or a folder."""
    sparsity: float = 0.5
    """Fraction of KV heads that stream in the second run, 0 to 1."""
    length: int = 4096
    """Prompt length in tokens."""
    depth: float = 0.4
    """Where the passkey is hidden: 0 the start of the text, 1 its end."""
    haystack: str = DEFAULT
    """Text to hide it in: pydoc (Python's own reference pages), a text file, or a folder of them."""
    seed: int = 0
    """Decides the key and the stretch of text."""
    max_new_tokens: int = 12
    """Tokens of each answer."""

    def requests(self) -> list[Request]:
        """The attention of the three runs, for certification."""
        some, none = (HeadPattern.load(self.pattern, sparsity=sparsity) for sparsity in (self.sparsity, 1.0))
        return inference(open_config(self.model), None, some, none)

    def run(self) -> None:
        """Load, ask three times, print a table."""
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        begin = time.perf_counter()
        console, progress = Console(), Console(stderr=True)
        tokenizer = load_tokenizer(self.model)
        rng = np.random.default_rng(self.seed)
        needle = digits(rng)
        hay = np.asarray(encode(tokenizer, load_haystack(self.haystack)), np.int32)
        prompt = insert_needle(tokenizer, hay, needle, rng, length=self.length, depth=self.depth)
        some = HeadPattern.load(self.pattern, sparsity=self.sparsity)
        none = HeadPattern.load(self.pattern, sparsity=1.0)
        model = load_model(self.model)
        console.print(
            f"{self.model}: the passkey {needle.key[0]} is at token {prompt.position} of {len(prompt.tokens)}; "
            f"streaming heads see the first {some.sink_size} and the last {some.recent_size} tokens."
        )
        runs = {
            "full attention": None,
            f"{some.num_streaming} of {some.is_retrieval.size} heads stream": some,
            "every head streams": none,
        }
        table = Table(*("attention", "answer", "KV MB", "prefill s", "tok/s", "compile s"))
        for name, pattern in runs.items():
            with progress.status(name) as spinner:
                answer, took = self._ask(LM(model, tokenizer, pattern), prompt.tokens, partial(_show, spinner, name))
            verdict = "right" if needle.score(answer, needle.key) else "wrong"
            table.add_row(
                name,
                verdict,
                f"{took['kv_bytes'] / 1e6:.1f}",
                f"{took['prefill_seconds']:.2f}",
                f"{took['decode_tokens_per_second']:.1f}",
                f"{took['compile_seconds']:.1f}",
            )
            console.print(f"{name}: {answer!r} is {verdict}")
        console.print(table)
        console.print(f"{time.perf_counter() - begin:.0f} s in all")

    def _ask(
        self, lm: LM, tokens: Int32[np.ndarray, "T"], status: Callable[[str], None]
    ) -> tuple[str, dict[str, int | float]]:
        cache = lm.make_cache(cache_room(len(tokens) + self.max_new_tokens))
        timings = Timings(lm.model.config, cache, len(tokens), status)
        running = TextStream(
            lm,
            [tokens.tolist()],
            cache=cache,
            max_new_tokens=self.max_new_tokens,
            progress=timings.progress,
            watch=timings.watch,
        )
        return running.finish()[0], timings.record()


def _show(spinner: Status, name: str, text: str) -> None:
    spinner.update(f"{name}: {text}")
