"""LM: text in, text out. A model, its tokenizer and a head pattern in one object; knows nothing of terminals."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array
from jax.sharding import Mesh

from duo_jax.arguments import ArgumentError
from duo_jax.cache.cache import KVCache
from duo_jax.certified import certify_model, inference
from duo_jax.checkpoint.load import load_model
from duo_jax.checkpoint.open import load_tokenizer, open_config, open_source
from duo_jax.checks import check_ids, check_key
from duo_jax.generation.generation import Request, prepare
from duo_jax.generation.sampling_settings import SamplingSettings
from duo_jax.generation.token_loop import Generation, Watch
from duo_jax.mesh.mesh import MeshSize
from duo_jax.model.model import Model
from duo_jax.model.precision import ALLOWED, AnyDtype, check_name
from duo_jax.pattern.pattern import HeadPattern
from duo_jax.text import template
from duo_jax.text.ends import Ends, eos_ids_of, stop_ends
from duo_jax.text.reply import Reply, Row
from duo_jax.text.template import Message
from duo_jax.text.tokenizer import TextTokenizer
from duo_jax.text.tokens import check_text, encode

if TYPE_CHECKING:
    import duo_jax.text.document


def load(
    source: str | Path,
    *,
    pattern: HeadPattern | str | Path | None = None,
    dtype: AnyDtype | None = None,
    weight_dtype: AnyDtype | None = None,
    embed_dtype: AnyDtype | None = None,
    kv_dtype: AnyDtype | None = None,
    mesh: Mesh | None = None,
    accept_terms: bool = False,
    progress: bool | None = None,
    **pattern_options: Any,
) -> "LM":
    """Load a model and its tokenizer: `lm = duo_jax.load("model", pattern="name", sparsity=0.5)`.

    Args:
        source: a Hugging Face folder, a GGUF file, a packaged model's name, or a hub id.
        pattern: which heads stream: a `HeadPattern`, a published name or a folder; None for full attention.
        dtype: data type of weights and cache; by default the checkpoint's, or float32 on a CPU.
        weight_dtype: quantize the linear maps of the layers, see `load_model`.
        embed_dtype: quantize embeddings and head, see `load_model`.
        kv_dtype: data type of the cache, the model's by default; int8 and int4 quantize the retrieval heads' part.
        mesh: devices that share model and cache, from `make_mesh`.
        accept_terms: the user has read and accepts the terms of use that a packaged model has.
        progress: show a progress bar while loading; by default only in a terminal.
        **pattern_options: as for `HeadPattern.load` (`sparsity=`, `threshold=`, ...), if `pattern` is a name.

    Raises:
        ValueError, FileNotFoundError, PermissionError, NotImplementedError: see `load_model` and `HeadPattern.load`.
        TypeError: a name that is none of these arguments.
    """
    _check_names(pattern_options)
    if kv_dtype is not None:
        check_name("kv_dtype", kv_dtype, ALLOWED["kv_dtype"])
    if isinstance(pattern, HeadPattern) or pattern is None:
        if pattern_options:
            raise ValueError(f'{sorted(pattern_options)} choose heads from a named pattern: pass pattern="name" too')
        chosen = pattern
    else:
        chosen = HeadPattern.load(pattern, **pattern_options)
    config = open_config(source, accept_terms=accept_terms).with_dtypes(dtype=dtype)
    if chosen is not None:
        chosen = chosen.of(config)
    tokenizer = load_tokenizer(source, accept_terms=accept_terms)
    template.start(tokenizer)
    sampling = open_source(source, weights=False, accept_terms=accept_terms).sampling
    attention = inference(config, chosen, kv_dtype=kv_dtype, mesh=MeshSize.of(mesh))
    certify_model(config, attention)  # Not the mesh: `load_model` lets its processes agree.
    options: dict[str, Any] = {"dtype": dtype, "weight_dtype": weight_dtype, "embed_dtype": embed_dtype}
    options |= {"mesh": mesh, "pattern": chosen if mesh is not None else None}
    model = load_model(source, **options, accept_terms=accept_terms, progress=progress)
    return LM(model, tokenizer, chosen, kv_dtype, sampling)


def _check_names(pattern_options: dict[str, Any]) -> None:
    """Raise TypeError for a name that neither `load` nor `HeadPattern.load` takes, with the nearest that they do."""
    known = [*inspect.signature(load).parameters, *inspect.signature(HeadPattern.load).parameters]
    for name in pattern_options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            way = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"load() got an unexpected keyword argument {name!r}{way}")


@dataclass(frozen=True)
class LM:
    """A language model ready to use. Calls whose sizes round up to the same bucket share compiled programs.

    `sampling` are the model's own generation settings, which `Chat` uses by default. All other calls take the most
    likely token unless they are given a sampler: `sampler=lm.sampling.sampler()`.
    """

    model: Model
    tokenizer: TextTokenizer
    pattern: HeadPattern | None = None
    kv_dtype: AnyDtype | None = None
    sampling: SamplingSettings = SamplingSettings()

    def __call__(
        self, text: str | Sequence[str], *, parse_special: bool = True, **options: Any
    ) -> "Reply | list[Reply]":
        """Continue a text, or several at once; `options` as for `stream`."""
        if not isinstance(text, Iterable):
            raise ArgumentError("text", f"must be a string or a list of strings, got {text!r:.60}")
        texts = [text] if isinstance(text, str) else list(text)
        prompts = [self.encode(prompt, parse_special=parse_special) for prompt in texts]
        replies = self.complete(prompts, **options)
        return replies[0] if isinstance(text, str) else replies

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        parse_special: bool = False,
        **options: Any,
    ) -> "Reply | list[Reply]":
        """Answer a conversation, or several at once: `[{"role": "user", "content": "Hello"}]`.

        Special tokens that are written in messages are text like any other, unless `parse_special` is set.

        Raises:
            ValueError: a tokenizer without a chat template, or messages that it refuses.
        """
        several = isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list | tuple)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [self.encode_chat(conversation, parse_special=parse_special) for conversation in conversations]
        replies = self.complete(prompts, **options)
        return replies if several else replies[0]

    def stream(self, text: str, *, parse_special: bool = True, **options: Any) -> "TextStream":
        """Continue a text and yield pieces of it as they are generated; iterate, then read `.reply`.

        Options:
            max_new_tokens: most tokens generated, 128 by default.
            sampler: how tokens are chosen, `Greedy()` by default.
            seed: an integer or `jax.random` key; needed by a random sampler.
            stop: strings that end the text, special tokens among them; they are not part of it.
            eos_ids: tokens that end the text; by default `eos_ids` of this object.
            parse_special: special tokens that are written in the text are control tokens, otherwise text.
        """
        return TextStream(self, [self.encode(text, parse_special=parse_special)], **options)

    def document(
        self, text: str, *, room: int = 1024, max_length: int | None = None, parse_special: bool = False
    ) -> "duo_jax.text.document.Document":
        """Prefill a long text once, to ask many questions about it: `with lm.document(text) as doc: doc.ask("...")`.

        Args:
            text: the document.
            room: tokens left for a question and its answer.
            max_length: most tokens of cache; by default as many as are needed.
            parse_special: special tokens that are written in the document or a question are control tokens. By default
                they are text like any other.

        Raises:
            ValueError: a document that leaves less than `room` tokens of `max_length`.
        """
        from duo_jax.text.document import Document  # It imports this module.

        return Document(self, text, room=room, max_length=max_length, parse_special=parse_special)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text or a turn: those of the model, the tokenizer and the chat template."""
        return eos_ids_of(self.model.config, self.tokenizer)

    def ends(self, stop: Sequence[str] = (), eos_ids: Sequence[int] | None = None) -> Ends:
        """What ends a reply with these options, as for `stream`.

        Raises:
            ValueError: stop strings that are empty or never appear; EOS ids that are not token ids.
        """
        eos_ids = self.eos_ids if eos_ids is None else check_ids(self.model.config, eos_ids)
        return stop_ends(self.tokenizer, self.model.config.vocab_size, eos_ids, stop)

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text to continue; `parse_special` as for `stream`.

        Raises:
            ValueError: an empty text, or one that is not Unicode.
        """
        if not check_text(text, "the prompt"):
            raise ValueError("the prompt is empty; give at least one character")
        return encode(self.tokenizer, text, special=True, parse_special=parse_special)

    def encode_chat(self, messages: Sequence[Message], *, parse_special: bool = False) -> list[int]:
        """Token ids of a conversation in the model's chat template, up to where the answer begins.

        Special tokens that are written in messages are text like any other, unless `parse_special` is set.

        Raises:
            ValueError: a tokenizer without a chat template, or messages that it refuses.
        """
        template.check_template(self.tokenizer)
        return template.encode_chat(self.tokenizer, messages, parse_special=parse_special)

    def make_cache(self, max_length: int, rows: int = 1) -> KVCache:
        """An empty cache."""
        config, mesh = self.model.config, self.model.mesh
        room = config.room(max_length)
        return KVCache.init(config, self.pattern, rows, room, dtype=self.kv_dtype, mesh=mesh)

    def request(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int | Array | None = None,
        eos_ids: Sequence[int] | None = None,
        cache: KVCache | None = None,
        history: Sequence[int] = (),
        **options: Any,
    ) -> Request:
        """Check prompts of token ids that continue `cache`, or an empty one; see `LM.stream` and `duo_jax.generate`.

        `history` are the tokens that every row of `cache` contains; other `options` as for `prepare`.
        """
        if fixed := sorted({"pattern", "kv_dtype"} & set(options)):
            raise TypeError(f"the model was loaded with its {' and '.join(fixed)}: give them to duo_jax.load instead")
        if not prompts:
            raise ValueError("no prompts were given; pass at least one")
        lengths = [len(prompt) for prompt in prompts]
        tokens = np.zeros((len(prompts), max(lengths)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        if cache is None:
            options |= {"pattern": self.pattern, "kv_dtype": self.kv_dtype}
        if len(history):
            options["history"] = np.tile(np.asarray(history, np.int32), (len(prompts), 1))
        seed = check_key("seed", seed)
        eos_ids = self.ends(eos_ids=eos_ids).ids
        return prepare(self.model, tokens, lengths=lengths, eos_ids=eos_ids, key=seed, cache=cache, **options)

    def complete(self, prompts: Sequence[Sequence[int]], *, stop: Sequence[str] = (), **options: Any) -> list[Reply]:
        """Replies to prompts of token ids; `options` as for `request`.

        One compiled program generates all tokens, unless stop strings must be searched for after each.
        """
        ends = self.ends(stop, options.pop("eos_ids", None))
        if ends.strings:
            return TextStream(self, prompts, stop=stop, eos_ids=ends.eos_ids, **options).finish()
        return self._replies(ends, self.request(prompts, eos_ids=ends.ids, **options).run())

    def _replies(self, ends: Ends, out: Generation) -> list[Reply]:
        arrays = np.asarray(out.tokens), np.asarray(out.logprobs), np.asarray(out.lengths)
        replies = []
        for tokens, logprobs, length in zip(*arrays, strict=True):
            row = Row(self.tokenizer, ends)
            row.add_all(tokens[:length].tolist(), logprobs[:length].tolist())
            replies.append(row.reply)
        return replies


class TextStream(Iterator[str]):
    """Pieces of a reply as they are generated. `replies` has every row's text so far, `reply` that of the only one."""

    def __init__(
        self,
        lm: LM,
        prompts: Sequence[Sequence[int]],
        *,
        stop: Sequence[str] = (),
        eos_ids: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        watch: Watch | None = None,
        width: int | None = None,
        **options: Any,
    ) -> None:
        """See `LM.stream`; `options` as for `LM.request`, `progress` and `watch` as for `Request.stream`.

        `width` are tokens of the prompts that are computed at a time, to which shorter ones are padded.
        """
        ends = lm.ends(stop, eos_ids)
        request = lm.request(prompts, eos_ids=ends.ids, **options)
        if width is not None:
            request = replace(request, width=width)
        self._rows = [Row(lm.tokenizer, ends) for _ in prompts]
        self._steps = request.stream(progress, watch)
        self._is_done = False

    @property
    def replies(self) -> list[Reply]:
        """The reply of each row so far."""
        return [row.reply for row in self._rows]

    @property
    def reply(self) -> Reply:
        """The reply of the only row so far."""
        return self._rows[0].reply

    @property
    def cache(self) -> KVCache:
        """The cache as it is now: the prompt and every token generated."""
        return self._steps.cache

    @property
    def failed(self) -> bool:
        """Whether NaN or infinite logits ended the stream; its cache is then unusable."""
        return self._steps.failed

    def finish(self) -> list[Reply]:
        """Generate the rest and return the reply of each row."""
        for _ in self:
            pass
        return self.replies

    def __next__(self) -> str:
        """Generate a token in every row and return the text of the first that can be shown."""
        if self._is_done:
            raise StopIteration
        if not self._steps.cache.is_alive:
            raise ValueError(
                "this stream cannot continue: its cache was used for a later question or turn; finish one reply before "
                "the next, or use its text so far, .reply"
            )
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
