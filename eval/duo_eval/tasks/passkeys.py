"""Hidden passkeys scored by teacher forcing: how likely is each token of an answer, given everything before it?

Knows no patterns by name and no files. Text, words and seed differ from those that gates are trained on.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from duo_train.data.needles import NeedleData, Needles, Sample
from duo_train.data.vocabulary import HELD_OUT

from duo_jax import HeadPattern, KVCache, Model, prefill, score
from duo_jax.finite import check_finite

UNSEEN = Needles(
    haystack="essays", vocabulary=HELD_OUT, distinct_words=True, num_passkeys=16, passkey_words=5, seed=20_000
)


def fit(config: Needles, tokenizer: Any, length: int) -> NeedleData:
    """Needle data whose samples have at most `length` tokens in total, and only slightly fewer."""
    probe = NeedleData(replace(config, min_length=length, max_length=length, num_lengths=1), tokenizer)
    around = max(len(probe[number].tokens) for number in range(32)) - length
    text = length - around - 8
    if text < 1:
        raise ValueError(
            f"a sample of {length} tokens has too little room for {config.num_passkeys} passkeys, which take {around} "
            "with their questions: raise --lengths or lower --data.num-passkeys"
        )
    return NeedleData(replace(config, min_length=text, max_length=text, num_lengths=1), tokenizer)


def score_text(
    model: Model,
    data: NeedleData,
    length: int,
    number: int,
    pattern: HeadPattern,
    *,
    prose: bool,
    kv_dtype: str | None = None,
) -> dict[str, Any]:
    """Score a sample with hidden passkeys, or a stretch of prose."""
    if prose:
        return score_prose(model, data, length, number, pattern, kv_dtype=kv_dtype)
    return score_sample(model, data[number], length, pattern, kv_dtype=kv_dtype)


def score_sample(
    model: Model, sample: Sample, length: int, pattern: HeadPattern, *, kv_dtype: str | None = None
) -> dict[str, Any]:
    """For each passkey: its tokens, how many of them greedy decoding would take, their negative log-likelihood."""
    tokens = jnp.asarray(sample.tokens)[None]
    cache = KVCache.init(model.config, pattern, 1, model.config.room(max(length, tokens.shape[1])), dtype=kv_dtype)
    # The last token before the questions is scored with them, so that every token of an answer has a predecessor.
    begin = sample.tail - 1
    _, cache = prefill(model, tokens[:, :begin], cache)
    scores, _ = score(model, tokens[:, begin:], cache)
    top, logprobs = np.asarray(scores.is_top[0]), np.asarray(scores.logprobs[0], np.float64)
    check_finite("the log-probabilities of a sample are", logprobs, model.dtype)
    spans = [slice(first - begin - 1, last - begin - 1) for first, last in sample.answers]
    return {
        "tokens": [span.stop - span.start for span in spans],
        "hits": [int(top[span].sum()) for span in spans],
        "nll": [-float(logprobs[span].sum()) for span in spans],
    }


def score_prose(
    model: Model,
    data: NeedleData,
    length: int,
    number: int,
    pattern: HeadPattern,
    *,
    kv_dtype: str | None = None,
) -> dict[str, Any]:
    """Next-token loss on a stretch of the text without needles."""
    begin = int(np.random.default_rng((data.config.seed, number)).integers(0, len(data.text) - length + 1))
    tokens = jnp.asarray(data.text[begin : begin + length])[None]
    scores, _ = score(model, tokens, KVCache.init(model.config, pattern, 1, model.config.room(length), dtype=kv_dtype))
    check_finite("the log-probabilities of a stretch of text are", scores.logprobs, model.dtype)
    return {
        "tokens": [length - 1],
        "hits": [int(scores.is_top.sum())],
        "nll": [-float(np.asarray(scores.logprobs, np.float64).sum())],
    }
