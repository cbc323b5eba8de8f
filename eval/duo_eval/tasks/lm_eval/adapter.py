"""DuoLM: a model with a head pattern as lm-evaluation-harness sees it, text in, likelihoods and text out."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from duo_eval.methods.method import Method
from duo_eval.methods.patterns import Pooled
from duo_eval.tasks.lm_eval.answering import Batched, Engine, Likelihood, OneByOne
from duo_eval.tasks.lm_eval.batches import Prefiller, Tokens
from duo_jax import LM, Categorical, Greedy, Temperature, TopK, TopP
from duo_jax.arguments import whole_number
from duo_jax.generation.sampling import Sampler
from duo_jax.text.template import check_template, render
from duo_jax.text.tokens import special_tokens

# A shorter context is computed again for each continuation: more rows in a batch cost less than more turns.
MIN_ASKED_IN_TURNS = 16
# Settings of a generation that are accepted only with these values, which change nothing.
NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}

# A request as lm-eval encodes it: context and continuation as text, then as tokens.
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


class DuoLM(TemplateLM):
    """An `LM` of lm-evaluation-harness over a `duo_jax.LM`: pass it to `lm_eval.simple_evaluate(model=...)`.

    Texts are encoded, cut at stop strings and rolled over windows as lm-eval's own adapter for transformers does it, so
    that both give the same numbers; but a text longer than `max_length` is refused unless `truncate` is set.

    Args:
        lm: model, tokenizer and head pattern.
        method: a way to hold the context, in place of the head pattern. Unless it is a fixed pattern, contexts are then
            computed one by one.
        budget: fraction of full attention's KV bytes that the method may hold.
        name: name of the model in results and in lm-eval's caches of requests.
        batch_size: most rows computed together.
        max_length: most tokens that the model reads for a request; by default the length that it was trained for. As in
            lm-eval, the last token of a scored text is not read.
        truncate: cut longer texts at the left, as lm-eval does for transformers, in place of refusing them.
        backend: attention backend; None takes the fastest one that is right on this device.
        progress: show progress bars.
    """

    def __init__(
        self,
        lm: LM,
        *,
        method: Method | None = None,
        budget: float = 1.0,
        name: str = "duo-jax",
        batch_size: int = 8,
        max_length: int | None = None,
        truncate: bool = False,
        backend: str | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        limit = lm.model.config.trained_positions
        whole_number("batch_size", batch_size, 1)
        if max_length is not None:
            whole_number("max_length", max_length, 2, limit, way=f"the model was trained for {limit} positions")
        self.lm, self.name = lm, name
        self.tokenizer: Any = lm.tokenizer  # transformers' own, as `duo_jax.load` has it.
        self.batch_size, self.max_length, self.truncate = batch_size, max_length or limit, truncate
        self._progress, self._dropped = progress, set[str]()
        if method is not None and lm.pattern is not None:
            raise ValueError("a method takes the place of a head pattern: give one of them")
        if isinstance(method, Pooled) and method.is_fixed:
            lm, method = replace(lm, pattern=method.pattern_for(lm.model, budget, 1)), None
        if method is not None and backend is not None:
            raise ValueError(f"{method.name} at a KV budget computes in its own way: leave out backend={backend!r}")
        self._engine: Engine = (
            Batched(lm, batch_size, Prefiller(lm.model, lm.pattern, backend=backend))
            if method is None
            else OneByOne(lm, method, budget)
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task sets no number."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path or self.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer would add them, but no second BOS before a text that has one."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt its last message stays open and can be continued.

        Raises:
            ValueError: a tokenizer without a chat template, or messages that it refuses.
        """
        check_template(self.tokenizer, "leave --chat out")
        opening = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return render(self.tokenizer, chat_history, **opening)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token once, in windows of `max_length` where a text is longer."""
        windows: list[Encoded] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolled = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            pieces = [make_disjoint_window(window) for window in rolled]
            windows += [(None, context, continuation) for context, continuation in pieces]
            owners += [owner] * len(pieces)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; requests of one context are answered together."""
        answers: dict[int, Likelihood] = {}
        with self._bar("loglikelihood", len(requests), disable_tqdm) as bar:
            for index, answer in self._likelihoods(requests):
                answers[index] = answer
                text = requests[index][0]
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, tuple(answer))
                bar.update(1)
        return [(answers[index].logprob, answers[index].is_greedy) for index in range(len(requests))]

    def _likelihoods(self, requests: Sequence[Encoded]) -> Iterator[tuple[int, Likelihood]]:
        """The index of each request, and its answer."""
        asked: dict[tuple[Any, ...], dict[Tokens, list[int]]] = {}
        for index, request in enumerate(requests):
            context, continuation = self._fitted(request)
            key = (context,) if len(context) >= MIN_ASKED_IN_TURNS else (context, index)
            asked.setdefault(key, {}).setdefault(continuation, []).append(index)
        groups = list(asked.values())
        for number, answers in self._engine.likelihoods([key[0] for key in asked], [tuple(group) for group in groups]):
            for indices, answer in zip(groups[number].values(), answers, strict=True):
                yield from ((index, answer) for index in indices)

    def _fitted(self, request: Encoded) -> tuple[Tokens, Tokens]:
        """Context and continuation, cut at the left, or refused.

        As in lm-eval, `max_length` counts inputs: the last token of a continuation is none.
        """
        text, context, continuation = request
        if not continuation:
            raise ValueError(f"a continuation has no tokens: {_short(text)}")
        # A context of only spaces, which belong to the continuation, is empty.
        context = context or [self.prefix_token_id]
        over = len(context) + len(continuation) - 1 - self.max_length
        if over > 0 and not (self.truncate and over < len(context)):
            raise ValueError(
                f"a context of {len(context)} tokens and a continuation of {len(continuation)}, whose last one is no "
                f"input, are more than the {self.max_length} of max_length: {_short(text)}; give fewer shots, or "
                "--truncate to cut the context at the left"
            )
        return tuple(context[max(0, over) :]), tuple(continuation)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to a stop string or a number of tokens; prompts with one beginning share its prefill."""
        texts: dict[int, str] = {}
        with self._bar("generate_until", len(requests), disable_tqdm) as bar:
            for index, text in self._texts([request.args for request in requests]):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update(1)
        return [texts[index] for index in range(len(requests))]

    def responses(self, requests: Sequence[tuple[str, Any]]) -> Iterator[tuple[int, Likelihood | str]]:
        """Answer requests of one kind as they are finished: the index of a request, and its response.

        Args:
            requests: context and continuation, to be scored; or context and settings of a generation.
        """
        if isinstance(requests[0][1], str):
            yield from self._likelihoods([(request, *self._encode_pair(*request)) for request in requests])
        else:
            yield from self._texts(requests)

    def _texts(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[int, str]]:
        """The index of each request, and its text."""
        groups: dict[str, list[int]] = {}
        for index, (_, settings) in enumerate(requests):
            groups.setdefault(repr(sorted(settings.items())), []).append(index)
        # Every request is checked before the first is computed.
        prepared = [self._generation([requests[index] for index in indices]) for indices in groups.values()]
        for indices, (contexts, options) in zip(groups.values(), prepared, strict=True):
            for row, text in self._engine.texts(contexts, options):
                yield indices[row], text

    def _generation(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[Tokens], dict[str, Any]]:
        """Contexts of requests with the same settings, and these settings as options of a stream."""
        options = self._options(requests[0][1])
        most = self.max_length - options["max_new_tokens"]
        contexts = []
        for text, _ in requests:
            tokens = self.tok_encode(text) or [self.prefix_token_id]
            if len(tokens) > most and not (self.truncate and most > 0):
                raise ValueError(
                    f"a context of {len(tokens)} tokens and {options['max_new_tokens']} to be generated are more than "
                    f"the {self.max_length} of max_length: {_short(text)}; generate fewer, or give --truncate to cut "
                    "the context at the left"
                )
            contexts.append(tuple(tokens[-most:]))
        return contexts, options

    def _options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A task's settings of a generation as options of a stream."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        count, drawn, heat = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample"), kwargs.pop("temperature", 0.0)
        stop = handle_stop_sequences(kwargs.pop("until"), None)
        cuts = kwargs.pop("top_k", None), kwargs.pop("top_p", None)
        seed = int(kwargs.pop("seed", 0))
        unknown = {name: value for name, value in kwargs.items() if NEUTRAL.get(name, ...) != value}
        if unknown:
            raise NotImplementedError(f"generation does not support {unknown}: override them with --gen-kwargs")
        sampler: Sampler = Greedy()
        if drawn and heat:
            top_k = [TopK(int(cuts[0]))] if cuts[0] else []
            top_p = [TopP(float(cuts[1]))] if cuts[1] and cuts[1] < 1 else []
            sampler = Categorical((Temperature(float(heat)), *top_k, *top_p))
        stop = self._possible(stop)
        self.lm.ends(stop)  # Refuses what cannot end a reply.
        return {"max_new_tokens": count, "sampler": sampler, "seed": seed, "stop": stop}

    def _possible(self, stop: Sequence[str]) -> tuple[str, ...]:
        """The stop strings of a task without those that never appear, which `LM` would refuse, with one warning each.

        Tasks have stop strings for many models: decoded text has no special tokens, so it has none with other text.
        """
        specials = special_tokens(self.tokenizer)
        dropped = [text for text in stop if text not in specials and any(token in text for token in specials)]
        if new := [text for text in dropped if text not in self._dropped]:
            self._dropped.update(new)
            warnings.warn(
                f"the stop strings {new} never appear, as they have a special token and other text: left out",
                stacklevel=2,
            )
        return tuple(text for text in stop if text and text not in dropped)

    def _bar(self, what: str, total: int, disable: bool) -> Any:
        return tqdm(total=total, desc=what, disable=disable or not self._progress, dynamic_ncols=True)


def _short(text: object) -> str:
    quoted = repr(text)
    return quoted if len(quoted) < 120 else f"{quoted[:60]} ... {quoted[-60:]}"
