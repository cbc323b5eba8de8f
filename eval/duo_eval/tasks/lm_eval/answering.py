"""Answers to contexts of token ids: in batches under a head pattern, or one by one under any method at a KV budget.

An engine scores continuations of contexts and generates text; it yields the index of a context with its answer. Knows
no task.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Float

from duo_eval.methods.registry import Method, reply
from duo_eval.tasks.lm_eval.batches import Prefiller, Tokens, padded, plan, width
from duo_jax import LM, Greedy, KVCache, TextStream
from duo_jax.finite import check_finite
from duo_jax.generation.infer import score_targets


class Likelihood(NamedTuple):
    """How likely a continuation is."""

    logprob: float  # natural logarithm of the probability of all of it
    is_greedy: bool  # whether no other token was more likely, at each of its tokens

    def __and__(self, then: "Likelihood") -> "Likelihood":
        """Likelihood of one continuation after another."""
        return Likelihood(self.logprob + then.logprob, self.is_greedy and then.is_greedy)


class Engine(Protocol):
    """What answers requests."""

    def likelihoods(
        self, contexts: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> Iterator[tuple[int, list[Likelihood]]]:
        """Score every continuation of every context; each has at least one token."""

    def texts(self, contexts: Sequence[Tokens], options: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
        """Continue every context; `options` are those of `duo_jax.TextStream`, with `max_new_tokens`."""


@dataclass(frozen=True, eq=False)
class Batched:
    """Full attention or one head pattern, with many contexts at a time and every context prefilled once.

    The first token of each continuation is scored by the logits after the context, which all of them share: single
    tokens, such as the letters of a multiple-choice question, cost nothing beyond the context.
    """

    lm: LM
    batch_size: int
    prefiller: Prefiller

    def likelihoods(
        self, contexts: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> Iterator[tuple[int, list[Likelihood]]]:
        """See `Engine.likelihoods`."""
        extra = [max(1, *(len(tokens) - 1 for tokens in row)) for row in continuations]
        longer = [[index for index, tokens in enumerate(row) if len(tokens) > 1] for row in continuations]
        for batch in plan(contexts, extra, [len(row) for row in longer], self.batch_size):
            cache, rests = self.prefiller.open(batch, contexts)
            logits, cache = self.prefiller.append(cache, rests)
            answers = {
                row: [next_token(logits[index], tokens[0], self.lm.model.dtype) for tokens in continuations[row]]
                for index, row in enumerate(batch.rows)
            }
            turns = max(len(longer[row]) for row in batch.rows)
            mark = cache.mark() if turns > 1 else None
            for turn in range(turns):
                cache = cache.rewind(mark) if turn and mark is not None else cache
                asked = [longer[row][turn] if turn < len(longer[row]) else None for row in batch.rows]
                # A row without a further continuation gets any token.
                tokens = [
                    (0,) if which is None else continuations[row][which]
                    for row, which in zip(batch.rows, asked, strict=True)
                ]
                rest, cache = self._rest(cache, tokens)
                for index, (row, which) in enumerate(zip(batch.rows, asked, strict=True)):
                    if which is not None:
                        answers[row][which] &= rest[index]
            yield from answers.items()

    def texts(self, contexts: Sequence[Tokens], options: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
        """See `Engine.texts`; each batch adds its number to the seed."""
        extra = [options["max_new_tokens"]] * len(contexts)
        for number, batch in enumerate(plan(contexts, extra, [1] * len(contexts), self.batch_size)):
            cache, rests = self.prefiller.open(batch, contexts)
            running = TextStream(
                self.lm,
                [list(rest) for rest in rests],
                cache=cache,
                history=contexts[batch.rows[0]][: batch.shared],
                chunk_size=width(max(map(len, rests)), len(rests)),
                backend=self.prefiller.backend,
                **{**options, "seed": options.get("seed", 0) + number},
            )
            for _ in running:
                pass
            yield from zip(batch.rows, map(str, running.replies), strict=True)

    def _rest(self, cache: KVCache, rows: Sequence[Tokens]) -> tuple[list[Likelihood], KVCache]:
        """Likelihood of all tokens of each row but the first. The last one is scored, but is no input."""
        inputs, targets = zip(*((row[:-1] or row, row[1:] or row) for row in rows), strict=True)
        size = width(max(map(len, inputs)), len(rows))
        tokens, lengths = padded(inputs, size)
        scores, cache = score_targets(
            self.lm.model,
            tokens,
            padded(targets, size)[0],
            cache,
            chunk_size=size,
            lengths=lengths,
            backend=self.prefiller.backend,
        )
        logprobs, is_top = np.asarray(scores.logprobs, np.float64), np.asarray(scores.is_top)
        counts = [len(row) - 1 for row in rows]
        for row, count in enumerate(counts):
            check_finite("the log-probabilities of a continuation are", logprobs[row, :count], self.lm.model.dtype)
        sums = [
            Likelihood(float(logprobs[row, :count].sum()), bool(is_top[row, :count].all()))
            for row, count in enumerate(counts)
        ]
        return sums, cache


@dataclass(frozen=True, eq=False)
class OneByOne:
    """Any method at a KV budget, one context at a time."""

    lm: LM
    method: Method
    budget: float

    def likelihoods(
        self, contexts: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> Iterator[tuple[int, list[Likelihood]]]:
        """See `Engine.likelihoods`.

        Raises:
            ValueError: a context too short for the budget, before anything is computed.
        """
        self._check(contexts)
        model = self.lm.model
        for row, context in enumerate(contexts):
            room = max(map(len, continuations[row])) - 1
            answers = []
            state, logits = None, None
            for tokens in continuations[row]:
                if logits is None or len(tokens) > 1:  # A step consumes its state and changes what the cache holds.
                    logits, state = self.method.begin(model, np.array(context), room=room, budget=self.budget)
                answer, after = next_token(logits, tokens[0], model.dtype), logits
                for token, then in pairwise(tokens):
                    after, state = self.method.step(model, token, state)
                    answer &= next_token(after, then, model.dtype)
                answers.append(answer)
            yield row, answers

    def texts(self, contexts: Sequence[Tokens], options: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
        """See `Engine.texts`.

        Raises:
            NotImplementedError: a sampler other than the greedy one.
            ValueError: a context too short for the budget, before anything is computed.
        """
        self._check(contexts)
        if not isinstance(options.get("sampler", Greedy()), Greedy):
            raise NotImplementedError("a method at a KV budget generates greedily: set do_sample=False in --gen-kwargs")
        asked: dict[str, Any] = {"budget": self.budget}
        asked |= {name: options[name] for name in ("max_new_tokens", "stop") if name in options}
        for row, context in enumerate(contexts):
            yield row, reply(self.method, self.lm.model, self.lm.tokenizer, np.array(context), **asked)[0]

    def _check(self, contexts: Sequence[Tokens]) -> None:
        """Refuse contexts that the method cannot hold within its budget; lm-eval cannot leave a request out."""
        for length in sorted({len(context) for context in contexts}):
            try:
                self.method.check(self.lm.model, self.budget, length)
            except ValueError as error:
                raise ValueError(
                    f"a budget of {self.budget:g} is too small for a context of {length} tokens ({error}); lm-eval "
                    "needs a number for every request: raise --budget, ask for more shots, or leave out the tasks with "
                    "short contexts"
                ) from None


def next_token(logits: Float[Array, "V"], token: int, dtype: Any) -> Likelihood:
    """Likelihood of a token, given the logits of the token before it from a model of this data type.

    Raises:
        FloatingPointError: NaN or infinite logits.
    """
    row = np.asarray(logits, np.float64)
    check_finite("the logits of a context are", row.max(), dtype)
    total = np.log(np.exp(row - row.max()).sum()) + row.max()
    return Likelihood(float(row[token] - total), bool(row[token] >= row.max()))
