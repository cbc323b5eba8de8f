"""LM: text in, text out. A model, its tokenizer and a head pattern in one object; knows nothing of terminals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from duo_jax.cache.cache import KVCache
from duo_jax.checkpoint import load_model, load_tokenizer
from duo_jax.generate import stream
from duo_jax.infer import bucket, prefill
from duo_jax.model import Model
from duo_jax.pattern import HeadPattern
from duo_jax.sampling import Greedy, Sampler
from duo_jax.text.reply import Reply, Row

Message = dict[str, str]


def load(
    source: str | Path,
    *,
    pattern: HeadPattern | str | Path | None = None,
    dtype: str | None = None,
    weight_dtype: str | None = None,
    embed_dtype: str | None = None,
    kv_dtype: str | None = None,
    mesh: Mesh | None = None,
    progress: bool | None = None,
    **pattern_options: Any,
) -> "LM":
    """Load a model and its tokenizer: `lm = duo_jax.load("model", pattern="name", sparsity=0.5)`.

    Args:
        source: a Hugging Face folder, a GGUF file, a packaged model's name, or a hub id.
        pattern: which heads stream: a `HeadPattern`, a published name or a folder; None for full attention.
        dtype: data type of weights and cache; by default the checkpoint's, and float32 on a CPU.
        weight_dtype: quantize the linear maps of the layers, see `load_model`.
        embed_dtype: quantize embeddings and head, see `load_model`.
        kv_dtype: data type of the cache, where it is another: int8 and int4 quantize retrieval heads' keys and values.
        mesh: devices that share model and cache, from `make_mesh`.
        progress: show a progress bar while loading; by default only in a terminal.
        **pattern_options: as for `HeadPattern.load` (`sparsity=`, `threshold=`, ...), where `pattern` is a name.

    Raises:
        ValueError, FileNotFoundError, PermissionError, NotImplementedError: see `load_model` and `HeadPattern.load`.
    """
    if isinstance(pattern, HeadPattern) or pattern is None:
        if pattern_options:
            raise ValueError(f'{sorted(pattern_options)} choose heads from a named pattern: pass pattern="name" too')
        chosen = pattern
    else:
        chosen = HeadPattern.load(pattern, **pattern_options)
    dtypes = {"dtype": dtype, "weight_dtype": weight_dtype, "embed_dtype": embed_dtype}
    model = load_model(source, **dtypes, mesh=mesh, pattern=chosen, progress=progress)
    if chosen is not None:
        chosen.check(model.config)
    return LM(model, load_tokenizer(source), chosen, kv_dtype)


@dataclass(frozen=True)
class LM:
    """A language model ready to use. Calls share compiled programs where their sizes fall into one bucket."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    pattern: HeadPattern | None = None
    kv_dtype: str | None = None

    def __call__(self, text: str | Sequence[str], **options: Any) -> "Reply | list[Reply]":
        """Continue a text, or several at once; `options` as for `stream`."""
        texts = [text] if isinstance(text, str) else list(text)
        replies = self._finish([self._encode(one) for one in texts], options)
        return replies[0] if isinstance(text, str) else replies

    def chat(self, messages: Sequence[Message] | Sequence[Sequence[Message]], **options: Any) -> "Reply | list[Reply]":
        """Answer a conversation, or several at once: `[{"role": "user", "content": "Hello"}]`.

        Raises:
            ValueError: a tokenizer without a chat template, or messages that it refuses.
        """
        if isinstance(messages, dict) or not messages:
            raise ValueError('messages must be a list such as [{"role": "user", "content": "Hello"}], and not empty')
        single = isinstance(messages[0], dict)
        conversations = [messages] if single else messages
        replies = self._finish([self.encode_chat(one) for one in conversations], options)  # type: ignore[arg-type]
        return replies[0] if single else replies

    def stream(self, text: str, **options: Any) -> "TextStream":
        """Continue a text and yield pieces of it as they come; iterate, then read `.reply`.

        Options:
            max_new_tokens: most tokens generated, 128 by default.
            sampler: how tokens are chosen, `Greedy()` by default.
            seed: an integer or `jax.random` key; needed by a random sampler.
            stop: strings that end the text; they are not part of it.
            eos_ids: tokens that end the text; the model's own by default.
        """
        return TextStream(self, [self._encode(text)], **options)

    def document(self, text: str, *, room: int = 1024, max_length: int | None = None) -> "Document":
        """Prefill a long text once, to be asked many times: `with lm.document(text) as doc: doc.ask("...")`.

        Args:
            text: the document.
            room: tokens left for a question and its answer.
            max_length: most tokens of cache; by default as many as are needed.

        Raises:
            ValueError: a document that leaves less than `room` tokens of `max_length`.
        """
        return Document(self, text, room=room, max_length=max_length)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in the model's chat template, up to where the answer begins."""
        self._need_template()
        return self._tokens(_render(self.tokenizer, messages))

    def chat_frame(self) -> tuple[list[int], str] | None:
        """What comes before a user's message (token ids) and after it (text); None without a chat template."""
        return chat_frame(self.tokenizer)

    def _need_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise ValueError("this model's tokenizer has no chat template: call it with plain text instead")

    def _encode(self, text: str) -> list[int]:
        if not text:
            raise ValueError("the prompt is empty; give at least one character")
        return self.tokenizer.encode(text)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _finish(self, prompts: list[list[int]], options: dict[str, Any]) -> "list[Reply]":
        running = TextStream(self, prompts, **options)
        for _ in running:
            pass
        return running.replies


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str] | None:
    """What comes before a user's message (token ids) and after it (text); None without a chat template."""
    if not tokenizer.chat_template:
        return None
    hole = "<<user>>"
    parts = _render(tokenizer, [{"role": "user", "content": hole}]).split(hole)
    if len(parts) != 2:
        raise ValueError("this model's chat template does not show a message once: use plain text instead")
    return tokenizer.encode(parts[0], add_special_tokens=False), parts[1]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from None


class TextStream(Iterator[str]):
    """Pieces of a reply as they come. `replies` has what every row said so far, `reply` that of the only one."""

    def __init__(
        self,
        lm: LM,
        prompts: list[list[int]],
        *,
        max_new_tokens: int = 128,
        sampler: Sampler = Greedy(),
        seed: int | Array | None = None,
        stop: Sequence[str] = (),
        eos_ids: tuple[int, ...] | None = None,
        cache: KVCache | None = None,
        history: Sequence[int] = (),
        chunk_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        """See `LM.stream` and `duo_jax.stream`; `history` are the tokens that every row of `cache` holds."""
        if not prompts:
            raise ValueError("no prompts were given; pass at least one")
        eos_ids = lm.model.config.eos_ids if eos_ids is None else tuple(eos_ids)
        self._rows = [Row(lm.tokenizer, eos_ids, stop) for _ in prompts]
        lengths = [len(prompt) for prompt in prompts]
        tokens = np.zeros((len(prompts), max(lengths)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        self._steps = stream(
            lm.model,
            tokens,
            pattern=None if cache is not None else lm.pattern,
            kv_dtype=None if cache is not None else lm.kv_dtype,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            lengths=lengths,
            eos_ids=eos_ids,
            key=seed,
            cache=cache,
            history=np.tile(np.asarray(history, np.int32), (len(prompts), 1)) if len(history) else None,
            chunk_size=chunk_size,
            backend=backend,
        )
        self._is_done = False

    @property
    def replies(self) -> list[Reply]:
        """What each row said so far."""
        return [row.reply for row in self._rows]

    @property
    def reply(self) -> Reply:
        """What the only row said so far."""
        return self._rows[0].reply

    @property
    def cache(self) -> KVCache:
        """The cache as it is now: the prompt and every token generated."""
        return self._steps.cache

    def __next__(self) -> str:
        """Generate a token in every row; what can be shown of the first."""
        if self._is_done:
            raise StopIteration
        step = next(self._steps, None)
        if step is None:
            self._is_done = True
            return self._rows[0].rest()
        shown = ""
        for index, row in enumerate(self._rows):
            if step.active[index]:
                new = row.add(int(step.token[index]), float(step.logprob[index]))
                shown = new if index == 0 else shown
                if row.stopped:
                    self._steps.stop(index)
        return shown


class Document:
    """A long text in the cache, to be asked many times. Made by `LM.document`; a context manager that frees it."""

    def __init__(self, lm: LM, text: str, *, room: int = 1024, max_length: int | None = None) -> None:
        """See `LM.document`."""
        if not text:
            raise ValueError("the document is empty; give at least one character")
        if room < 2:
            raise ValueError(f"room must be at least 2, for a question and an answer, got {room}")
        frame = lm.chat_frame()
        head, self._after = frame if frame else ([], "\n")
        tokens = head + lm._tokens(text) if frame else lm._encode(text)
        needed = len(tokens) + room
        if max_length is not None and needed > max_length:
            raise ValueError(
                f"the document has {len(tokens)} tokens and with {room=} for questions and answers needs {needed}, but "
                f"{max_length=}: shorten it, or raise max_length"
            )
        self._lm, self._tokens, self.num_tokens = lm, tokens, len(tokens)
        model = lm.model
        cache = KVCache.init(
            model.config, lm.pattern, 1, max_length or bucket(needed), dtype=lm.kv_dtype, mesh=model.mesh
        )
        _, cache = prefill(model, np.asarray(tokens, np.int32)[None], cache)
        cache.length.block_until_ready()  # The work is done here, not in the first question.
        self._mark = cache.mark()
        self._cache: KVCache | None = cache
        self._running: TextStream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self._alive().nbytes

    def ask(self, question: str, **options: Any) -> Reply:
        """Answer a question about the document; `options` as for `LM.stream`. Questions do not see each other."""
        running = self.stream(question, **options)
        for _ in running:
            pass
        return running.reply

    def stream(self, question: str, *, max_new_tokens: int = 128, **options: Any) -> TextStream:
        """Like `ask`, piece by piece. A second question may be asked before the first is answered to its end."""
        if not question:
            raise ValueError("the question is empty; give at least one character")
        tokens = self._lm._tokens(f"\n\n{question}{self._after}")
        room = self._alive().max_length - self.num_tokens
        if len(tokens) + max_new_tokens > room:
            raise ValueError(
                f"the question has {len(tokens)} tokens, with {max_new_tokens=} more than the {room} left beside the "
                "document: ask for less, or make the document with a larger room="
            )
        # The newest stream holds the cache: take it back, wherever that stream stopped.
        cache = self._alive().rewind(self._mark)
        options |= {"max_new_tokens": max_new_tokens, "cache": cache, "history": self._tokens}
        self._running = TextStream(self._lm, [tokens], **options)
        return self._running

    def close(self) -> None:
        """Free the cache."""
        self._cache = self._running = None

    def __enter__(self) -> "Document":
        """The document itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the cache."""
        self.close()

    def _alive(self) -> KVCache:
        if self._cache is None:
            raise ValueError("this document was closed; make it again with lm.document(text)")
        return self._cache if self._running is None else self._running.cache
