"""The least cost of a phase: bytes read by a decode step, floating-point operations of a prefill.

Measurements are compared with these. The formulas count the pairs that are actually visible, for any head pattern.
"""

from duo_jax import HeadPattern, ModelConfig


def kv_bytes_read(config: ModelConfig, pattern: HeadPattern, *, batch_size: int, length: int, itemsize: int) -> int:
    """Bytes of keys and values that one decode step reads: `2 * H * bytes * B * (Pr * length + Ps * ring + ...)`."""
    tokens = sum(keep * heads for keep, heads in _kept(config, pattern, length))
    return 2 * config.head_dim * itemsize * batch_size * tokens


def decode_bytes(config: ModelConfig, pattern: HeadPattern, *, batch_size: int, length: int, itemsize: int) -> int:
    """The least bytes that one decode step reads: weights once, and the visible keys and values.

    The embedding is a look-up, unless the head is the same table. Of a mixture of experts, a token's are counted: the
    tokens of a batch may choose others.
    """
    weights = config.active_parameters - (0 if config.tied_head else config.vocab_size * config.embed_dim)
    kv = kv_bytes_read(config, pattern, batch_size=batch_size, length=length, itemsize=itemsize)
    return weights * itemsize + kv


def prefill_flops(config: ModelConfig, pattern: HeadPattern, *, batch_size: int, length: int) -> int:
    """Floating-point operations of a prefill: two per weight and token, `4 * H` per visible pair of a query head.

    The embedding is a look-up, and the head is needed only for the last token of a row.
    """
    embeddings = config.vocab_size * config.embed_dim * (1 if config.tied_head else 2)
    weights = (config.active_parameters - embeddings) * length + config.vocab_size * config.embed_dim
    group = config.num_heads // config.num_kv_heads
    pairs = sum(heads * visible_pairs(length, keep) for keep, heads in _kept(config, pattern, length))
    return batch_size * (2 * weights + 4 * config.head_dim * group * pairs)


def visible_pairs(length: int, capacity: int) -> int:
    """Query-key pairs of one head in a causal text, when it sees at most `capacity` keys at a time."""
    capacity = min(capacity, length)
    return capacity * (capacity + 1) // 2 + (length - capacity) * capacity


def saving_realized(full_time: float, duo_time: float, full_cost: int, duo_cost: int) -> float:
    """The fraction of the saving that the costs promise: 1 is all of it."""
    return (full_time - duo_time) / (full_time * (1 - duo_cost / full_cost))


def _kept(config: ModelConfig, pattern: HeadPattern, length: int) -> list[tuple[int, int]]:
    """(tokens a head keeps, number of heads) by head type, and for each layer with a window of its own."""
    own = [(min(length, size), config.num_kv_heads) for size in config.layer_windows if size is not None]
    return [(length, pattern.num_retrieval), (min(length, pattern.window.size), pattern.num_streaming), *own]
