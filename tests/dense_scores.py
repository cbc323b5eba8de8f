"""Scores of tokens and choices of pages stated densely, in numpy, one query and one key at a time.

Each follows its paper's formula and shares nothing with the methods but the model.
"""

import jax.numpy as jnp
import numpy as np

# Of every pass, padded at its end: the model's operations are compiled once.
SIZE = 192


def softmax(logits):
    """Along the last axis."""
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def passed(model, tokens, see=lambda layer, head, row, q, k: np.arange(len(k)) <= row):
    """Logits at every position, and each layer's queries, keys and values, float64, `[T N H]` and `[T K H]`.

    `see(layer, head, row, q, k)` is the mask of keys that a query head's query at a row sees, of its KV head's keys.
    """
    config, found = model.config, []

    def attend(state, layer, q, k, v):
        q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
        found.append((q, k, v))
        out = np.zeros_like(q)
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.num_kv_heads)
            for row in range(length):
                logits = k[:, group] @ q[row, head] / np.sqrt(q.shape[-1])
                mask = see(layer, head, row, q[row, head], k[:, group])
                out[row, head] = softmax(np.where(mask, logits, -np.inf)) @ v[:, group]
        return jnp.asarray(out[None], jnp.float32), state

    length = len(tokens)
    padded = jnp.asarray([*tokens, *(0,) * (SIZE - length)], jnp.int32)[None]
    decoder = model.decoder
    hidden, _ = decoder.hidden(padded, jnp.arange(SIZE, dtype=jnp.int32)[None], attend, None)
    return np.asarray(decoder.logits(hidden[0]))[:length], [[x[:length] for x in arrays] for arrays in found]


def kvzip(model, tokens, repeats, first):
    """Scores `[L K T]`; `repeats` has for each part its range and the tokens that repeat it."""
    config = model.config
    scores = np.zeros((config.num_layers, config.num_kv_heads, len(tokens)))
    scores[:, :, :first] = np.inf
    for begin, end, repeat in repeats:
        _, found = passed(model, [*tokens, *repeat])
        for layer, (q, k, _) in enumerate(found):
            for head in range(config.num_heads):
                group = head // (config.num_heads // config.num_kv_heads)
                for row in range(len(tokens), len(q)):
                    shown = [*range(first), *range(begin, end), *range(len(tokens), row + 1)]
                    weights = softmax(k[shown, group] @ q[row, head] / np.sqrt(q.shape[-1]))
                    own = scores[layer, group, begin:end]
                    np.maximum(own, weights[first : first + end - begin], out=own)
    return scores


def rope_matrix(theta, head_dim, position):
    """RoPE as a matrix: pairs (i, i + H/2) turn by `position * theta ** (-2i / H)`."""
    half = head_dim // 2
    matrix = np.zeros((head_dim, head_dim))
    for i in range(half):
        angle = position * theta ** (-2 * i / head_dim)
        matrix[i, i] = matrix[half + i, half + i] = np.cos(angle)
        matrix[i, half + i], matrix[half + i, i] = -np.sin(angle), np.sin(angle)
    return matrix


def expected_attention(model, tokens, *, future, sinks, epsilon):
    """Scores `[L K T]`."""
    config, theta = model.config, model.config.rope.theta
    length, head_dim = len(tokens), config.head_dim
    average = np.mean([rope_matrix(theta, head_dim, length + i) for i in range(future)], axis=0)
    back = [rope_matrix(theta, head_dim, position).T for position in range(length)]
    scores = np.full((config.num_layers, config.num_kv_heads, length), np.inf)
    group = config.num_heads // config.num_kv_heads
    for layer, (q, k, v) in enumerate(passed(model, tokens)[1]):
        shares = np.zeros((config.num_heads, length - sinks))
        for head in range(config.num_heads):
            plain = np.array([back[row] @ q[row, head] for row in range(sinks, length)])
            mean, covariance = average @ plain.mean(0), average @ np.cov(plain.T, bias=True) @ average.T
            keys = k[sinks:, head // group]
            shares[head] = softmax(
                np.array([key @ mean / np.sqrt(head_dim) + key @ covariance @ key / (2 * head_dim) for key in keys])
            )
        for head in range(config.num_kv_heads):
            mean_share = shares[head * group : (head + 1) * group].mean(0)
            scores[layer, head, sinks:] = (mean_share + epsilon) * np.linalg.norm(v[sinks:, head], axis=-1)
    return scores


def top(scores, count):
    """Whether each of a list of scores is among the `count` highest; they are all different, or infinite."""
    chosen = np.zeros(scores.size, bool)
    chosen[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return chosen.reshape(scores.shape)


def quest_pages(q, k, row, *, page, count):
    """Pages that a query reads of the keys up to its own: the newest, and those whose keys may have the best scores."""
    newest = row // page
    bounds = []
    for number in range(newest):
        keys = k[number * page : (number + 1) * page]
        bounds.append(sum(max(q[i] * keys[:, i].min(), q[i] * keys[:, i].max()) for i in range(len(q))))
    return {newest, *np.argsort(-np.array(bounds), kind="stable")[: count - 1].tolist()}
