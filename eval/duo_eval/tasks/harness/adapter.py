"""DuoLM: a model with a head pattern as lm-evaluation-harness sees it, text in, likelihoods and text out."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from duo_eval.tasks.harness.batches import Prefiller, Tokens
from duo_eval.tasks.harness.generation import continuations
from duo_eval.tasks.harness.scoring import Likelihood, likelihoods
from duo_jax import LM, Categorical, Greedy, Temperature, TopK, TopP
from duo_jax.sampling import Sampler
from duo_jax.text.template import check_template, render

# A shorter context is computed again for every continuation: rows of a batch cost less than turns.
MIN_ASKED_IN_TURNS = 16
# Settings of a generation that change nothing here, as long as they say this.
NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True}

# What lm-eval hands to a model: the context and the continuation as text, and as tokens.
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


class DuoLM(TemplateLM):
    """An `LM` of lm-evaluation-harness over a `duo_jax.LM`: pass it to `lm_eval.simple_evaluate(model=...)`.

    Texts are encoded, cut at stop strings and rolled over windows as lm-eval's own adapter for transformers does it, so
    that both give the same numbers; but a text over `max_length` is refused unless `truncate` is set.

    Args:
        lm: model, tokenizer and head pattern.
        name: what the model is called in results, and in lm-eval's caches of requests.
        batch_size: most rows computed together.
        max_length: most tokens of a text; by default as many as the model was trained for.
        truncate: cut longer texts at the left, as lm-eval does for transformers, where they would be refused.
        backend: attention backend; None takes the best one verified on this device.
        progress: show progress bars.
    """

    def __init__(
        self,
        lm: LM,
        *,
        name: str = "duo-jax",
        batch_size: int = 8,
        max_length: int | None = None,
        truncate: bool = False,
        backend: str | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        limit = lm.model.config.trained_positions
        if batch_size < 1 or (max_length is not None and max_length < 2):
            raise ValueError(f"need batch_size >= 1 and max_length >= 2, got {batch_size=}, {max_length=}")
        if max_length is not None and max_length > limit:
            raise ValueError(f"max_length must be at most the model's {limit} positions, got {max_length=}")
        self.lm, self.tokenizer, self.name = lm, lm.tokenizer, name
        self.batch_size, self.max_length, self.truncate = batch_size, max_length or limit, truncate
        self._progress = progress
        self._prefiller = Prefiller(lm.model, lm.pattern, backend=backend)

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
        """Tokens generated where a task does not say how many."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests calls this tokenizer."""
        return str(self.tokenizer.name_or_path or self.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer would add them, but no second BOS before a text that has one."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt its last message is left open, to be gone on with.

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
            # The last token of a window is in the cache too, where lm-eval counts inputs alone.
            rolled = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1)
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
        asked: dict[tuple[Any, ...], dict[Tokens, list[int]]] = {}
        for index, request in enumerate(requests):
            context, continuation = self._fitted(request)
            key = (context,) if len(context) >= MIN_ASKED_IN_TURNS else (context, index)
            asked.setdefault(key, {}).setdefault(continuation, []).append(index)
        contexts = [key[0] for key in asked]
        endings = [tuple(group) for group in asked.values()]
        answers: list[Likelihood | None] = [None] * len(requests)
        groups = list(asked.values())
        with self._bar("loglikelihood", len(requests), disable_tqdm) as bar:
            running = likelihoods(self._prefiller, contexts, endings, batch_size=self.batch_size)
            for number, found in running:
                for indices, answer in zip(groups[number].values(), found, strict=True):
                    for index in indices:
                        answers[index] = answer
                        text = requests[index][0]
                        if text is not None:
                            self.cache_hook.add_partial("loglikelihood", text, tuple(answer))
                        bar.update(1)
        return [(answer.logprob, answer.is_greedy) for answer in answers if answer is not None]

    def _fitted(self, request: Encoded) -> tuple[Tokens, Tokens]:
        """Context and continuation, cut at the left to `max_length`, or refused."""
        text, context, continuation = request
        if not continuation:
            raise ValueError(f"a continuation has no tokens: {_short(text)}")
        # A context of nothing but spaces, which belong to the continuation, leaves none.
        context = context or [self.prefix_token_id]
        over = len(context) + len(continuation) - self.max_length
        if over > 0 and not (self.truncate and over < len(context)):
            raise ValueError(
                f"a context of {len(context)} tokens and a continuation of {len(continuation)} are more than the "
                f"{self.max_length} of max_length: {_short(text)}; give fewer shots, or --truncate to cut the context "
                "at the left"
            )
        return tuple(context[max(0, over) :]), tuple(continuation)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to a stop string or so many tokens; prompts of one beginning share its prefill."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        texts = [""] * len(requests)
        # What is wrong with any request is said before the first is computed.
        prepared = [self._generation(requests, indices) for indices in groups.values()]
        with self._bar("generate_until", len(requests), disable_tqdm) as bar:
            for indices, (contexts, options) in zip(groups.values(), prepared, strict=True):
                running = continuations(self.lm, self._prefiller, contexts, options, batch_size=self.batch_size)
                for row, text in running:
                    request = requests[indices[row]]
                    texts[indices[row]] = text
                    self.cache_hook.add_partial("generate_until", request.args, text)
                    bar.update(1)
        return texts

    def _generation(self, requests: Sequence[Instance], indices: Sequence[int]) -> tuple[list[Tokens], dict[str, Any]]:
        """Contexts of requests with the same settings, and these settings as options of a stream."""
        options = self._options(requests[indices[0]].args[1])
        most = self.max_length - options["max_new_tokens"]
        contexts = []
        for index in indices:
            text = requests[index].args[0]
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
            raise NotImplementedError(f"generation knows no {unknown}: set them aside with --gen-kwargs")
        sampler: Sampler = Greedy()
        if drawn and heat:
            top_k = [TopK(int(cuts[0]))] if cuts[0] else []
            top_p = [TopP(float(cuts[1]))] if cuts[1] and cuts[1] < 1 else []
            sampler = Categorical((Temperature(float(heat)), *top_k, *top_p))
        # A stop string that is a special token never shows up as text: it ends the row as a token.
        special = {text for text in stop if text in self.tokenizer.all_special_tokens}
        ids = {*self.lm.model.config.eos_ids, self.eot_token_id}
        ids |= {int(self.tokenizer.get_vocab()[text]) for text in special}
        texts = tuple(text for text in stop if text and text not in special)
        return {
            "max_new_tokens": count, "sampler": sampler, "seed": seed, "stop": texts, "eos_ids": tuple(sorted(ids)),
        }  # fmt: skip

    def _bar(self, what: str, total: int, disable: bool) -> Any:
        return tqdm(total=total, desc=what, disable=disable or not self._progress, dynamic_ncols=True)


def _short(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) < 120 else f"{shown[:60]} ... {shown[-60:]}"
