"""Three measures of one needle and of the text around it, from one prefill. Knows no budgets and no files."""

import time
from typing import Any

import numpy as np
from jaxtyping import Bool

from duo_eval.methods.patterns import PooledState
from duo_eval.tasks.needle.insert import NeedlePrompt
from duo_eval.tasks.needle.styles import Needle
from duo_jax import LM, score
from duo_jax.finite import check_finite
from duo_jax.generation.chunks import bucket, chunk_width
from duo_jax.generation.infer import Scores


def ask(lm: LM, needle: Needle, prompt: NeedlePrompt) -> dict[str, Any]:
    """Score the text, the right answer by teacher forcing, and the answer that greedy decoding gives.

    The prompt without its last token is prefilled once, which scores the text. That token then begins the right answer
    and, in the cache as it was before, the model's own.

    Raises:
        FloatingPointError: log-probabilities that are not finite.
    """
    begin = time.perf_counter()
    text, last = prompt.tokens[None, :-1], int(prompt.tokens[-1])
    room = max(needle.max_new_tokens, len(prompt.right))
    scores, cache = score(lm.model, text, lm.make_cache(bucket(len(prompt.tokens) + room)))
    memory, mark = PooledState(cache, chunk_width(text.shape[1])).memory, cache.mark()
    answered, cache = score(lm.model, np.array([[last, *prompt.right]], np.int32), cache)
    reply = lm.complete([[last]], cache=cache.rewind(mark), max_new_tokens=needle.max_new_tokens)[0]
    return {
        "score": needle.score(str(reply), needle.key),
        "answer": str(reply),
        "key": " ".join(needle.key),
        "position": prompt.position,
        "recall": _sums(lm, answered, np.ones(len(prompt.right), bool)),
        "text": _sums(lm, scores, prompt.is_text[1:-1]),
        "tokens": len(prompt.tokens),
        "new_tokens": len(reply.tokens),
        "kv_bytes": memory.nbytes,
        "held_bytes": memory.held_nbytes,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _sums(lm: LM, scores: Scores, chosen: Bool[np.ndarray, "T"]) -> dict[str, int | float]:
    """Of the chosen tokens: their number, how many were the likeliest, negative log-likelihood, and probability."""
    logprobs = np.asarray(scores.logprobs[0], np.float64)[chosen]
    check_finite("the log-probabilities of a question are", logprobs, lm.model.dtype)
    return {
        "tokens": len(logprobs),
        "hits": int(np.asarray(scores.is_top[0])[chosen].sum()),
        "nll": -float(logprobs.sum()),
        "probability": float(np.exp(logprobs).sum()),
    }
