"""How likely continuations of contexts are, in batches, every context prefilled once. Token ids only: knows no text."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from duo_eval.tasks.harness.batches import Prefiller, Tokens, padded, plan, width
from duo_jax import KVCache, score


class Likelihood(NamedTuple):
    """How likely a continuation is."""

    logprob: float  # natural logarithm of the probability of all of it
    is_greedy: bool  # whether no other token was more likely, at each of its tokens


def likelihoods(
    prefiller: Prefiller, contexts: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]], *, batch_size: int
) -> Iterator[tuple[int, list[Likelihood]]]:
    """Score every continuation of every context; yields a context's index and its answers, batch by batch.

    The first token of each continuation is scored by the logits after the context, which all of them share: single
    tokens, such as the letters of a multiple-choice question, cost nothing beyond the context.
    """
    extra = [max(map(len, row)) for row in continuations]
    longer = [[index for index, one in enumerate(row) if len(one) > 1] for row in continuations]
    for batch in plan(contexts, extra, [len(row) for row in longer], batch_size):
        cache, rests = prefiller.open(batch, contexts)
        logits, cache = prefiller.append(cache, rests)
        first = np.asarray(logits, np.float64)
        total = np.log(np.exp(first - first.max(-1, keepdims=True)).sum(-1)) + first.max(-1)
        found = {
            row: [_first(first[at], total[at], one[0]) for one in continuations[row]]
            for at, row in enumerate(batch.rows)
        }
        turns = max(len(longer[row]) for row in batch.rows)
        mark = cache.mark() if turns > 1 else None
        for turn in range(turns):
            cache = cache.rewind(mark) if turn and mark is not None else cache
            asked = [longer[row][turn] if turn < len(longer[row]) else None for row in batch.rows]
            # A row that was asked everything gets any token.
            tokens = [
                (0,) if index is None else continuations[row][index]
                for row, index in zip(batch.rows, asked, strict=True)
            ]
            logprobs, top, cache = _rest(prefiller, cache, tokens)
            for at, (row, index) in enumerate(zip(batch.rows, asked, strict=True)):
                if index is not None:
                    begin, count = found[row][index], len(tokens[at]) - 1
                    rest = float(logprobs[at, :count].sum()), bool(top[at, :count].all())
                    found[row][index] = Likelihood(begin.logprob + rest[0], begin.is_greedy and rest[1])
        yield from found.items()


def _first(logits: Float[np.ndarray, "V"], total: float, token: int) -> Likelihood:
    return Likelihood(float(logits[token] - total), bool(logits[token] >= logits.max()))


def _rest(prefiller: Prefiller, cache: KVCache, rows: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray, KVCache]:
    """Log-probabilities of all tokens of each row but the first, and whether each was the likeliest."""
    size = width(max(map(len, rows)), len(rows))
    tokens, lengths = padded(rows, size)
    scores, cache = score(prefiller.model, tokens, cache, chunk_size=size, lengths=lengths, backend=prefiller.backend)
    return np.asarray(scores.logprobs, np.float64), np.asarray(scores.is_top), cache
