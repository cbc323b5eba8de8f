"""A document: a long text in the cache, about which questions are asked. Knows no terminal and no files."""

from types import TracebackType
from typing import Any

import numpy as np

from duo_jax.arguments import whole_number
from duo_jax.cache.cache import KVCache
from duo_jax.generation.chunks import bucket
from duo_jax.generation.infer import prefill
from duo_jax.generation.token_loop import check_logits
from duo_jax.text import template
from duo_jax.text.lm import LM, TextStream
from duo_jax.text.reply import Reply
from duo_jax.text.template import DocumentFrame
from duo_jax.text.tokens import check_text


class Document:
    """A long text in the cache, to ask many questions about. Made by `LM.document`; a context manager that frees it."""

    def __init__(
        self, lm: LM, text: str, *, room: int = 1024, max_length: int | None = None, parse_special: bool = False
    ) -> None:
        """See `LM.document`."""
        if not check_text(text, "the document"):
            raise ValueError("the document is empty; give at least one character")
        room = whole_number("room", room, 2, way="a question and an answer need it")
        if max_length is not None:
            max_length = whole_number("max_length", max_length, 1)
        if template.has_template(lm.tokenizer):
            self._frame = DocumentFrame.chat(lm.tokenizer, parse_special=parse_special)
        else:
            self._frame = DocumentFrame(lm.tokenizer, between="\n\n", after="\n", parse_special=parse_special)
        self._text, self._tokens = text, self._frame.document(text)
        self.num_tokens = len(self._tokens)
        needed = self.num_tokens + room
        if max_length is not None and needed > max_length:
            raise ValueError(
                f"the document has {self.num_tokens} tokens and with {room=} for questions and answers needs {needed}, "
                f"but {max_length=}: shorten it, or raise max_length"
            )
        self._lm = lm
        self._max_length = max_length or bucket(needed)
        self._cache: KVCache | None = None
        self._running: TextStream | None = None
        self._failed = False
        self._prefill()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._newest_cache().nbytes

    def ask(self, question: str, **options: Any) -> Reply:
        """Answer a question about the document; `options` as for `LM.stream`. Questions do not see each other."""
        ends = self._lm.ends(options.get("stop", ()), options.get("eos_ids"))
        if ends.strings:
            return self.stream(question, **options).finish()[0]
        tokens, is_continued, options = self._continuation(question, **{**options, "eos_ids": ends.ids})
        options.pop("stop", None)
        out, failed = self._lm.request([tokens], **options).start()
        if is_continued:
            # Before the result is waited for: an interrupt then loses the answer, not the document.
            self._cache, self._running = out.cache, None
            self._failed = bool(failed)
        check_logits(int(failed), self._lm.model.dtype)
        return self._lm._replies(ends, out)[0]

    def stream(self, question: str, *, max_new_tokens: int = 128, **options: Any) -> TextStream:
        """Like `ask`, piece by piece. A second question may be asked before the first has been answered completely."""
        tokens, is_continued, options = self._continuation(question, max_new_tokens=max_new_tokens, **options)
        running = TextStream(self._lm, [tokens], **options)
        if is_continued:
            self._running = running
        return running

    def close(self) -> None:
        """Free the cache."""
        self._cache = self._running = None

    def __enter__(self) -> "Document":
        """Return the document itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the cache."""
        self.close()

    def _prefill(self) -> None:
        cache = self._lm.make_cache(self._max_length)
        _, cache = prefill(self._lm.model, np.asarray(self._tokens, np.int32)[None], cache)
        cache.length.block_until_ready()  # The prompt is computed here, not by the first question.
        self._mark = cache.mark()
        self._cache, self._running, self._failed = cache, None, False

    def _continuation(
        self, question: str, *, max_new_tokens: int = 128, **options: Any
    ) -> tuple[list[int], bool, dict[str, Any]]:
        """The tokens to compute for a question, whether they continue the document's cache, and all options."""
        if not check_text(question, "the question"):
            raise ValueError("the question is empty; give at least one character")
        tokens, known = self._frame.question(self._text, self._tokens, question), self.num_tokens
        is_continued = tokens is not None
        if tokens is None:
            # The question changes how the document is split into tokens, which is rare: all is computed, for it only.
            tokens, known = self._frame.whole(self._text, question), 0
        # The newest stream has the cache: take it back, wherever that stream stopped.
        cache = self._newest_cache()
        if self._failed or (self._running is not None and self._running.failed):
            # NaN in the cache spoils every later answer, although it is masked: 0 * NaN is NaN.
            self._prefill()
            cache = self._newest_cache()
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
        count = known + len(tokens) - self.num_tokens
        if self.num_tokens + count + max_new_tokens > cache.max_length:
            raise ValueError(
                f"the question has {count} tokens, with {max_new_tokens=} more than the "
                f"{cache.max_length - self.num_tokens} left after the document: ask for less, or make the document "
                "with a larger room="
            )
        options["max_new_tokens"] = max_new_tokens
        if is_continued:
            options |= {"cache": cache.rewind(self._mark), "history": self._tokens}
        else:
            options["cache"] = self._lm.make_cache(cache.max_length)
        return tokens, is_continued, options

    def _newest_cache(self) -> KVCache:
        if self._cache is None:
            raise ValueError("this document was closed; make it again with lm.document(text)")
        return self._cache if self._running is None else self._running.cache
