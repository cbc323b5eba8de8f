"""How decode cuts the rows of a batch into parts, and which program attends to which."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.schedule import Splits, row_of

# Llama-3-8B on an H200: eight programs for each of 132 multiprocessors, and 8 KV heads.
SPLITS = Splits(132, 132, (1 << 20, 320), 64, 256)
MANY = Splits(5, 3, (1000, 40), 8, 16)


def parts_of(splits: Splits, lengths: list[int], *, is_retrieval: bool) -> tuple[np.ndarray, ...]:
    """Of the parts of one head, in their order: row, first key, number of keys."""
    counts = jnp.asarray(lengths, jnp.int32)
    ends = splits.ends(counts)[int(is_retrieval)]
    numbers = jnp.arange(int(ends[-1]), dtype=jnp.int32)
    row, number = row_of(numbers, lambda b: ends[b], len(lengths))
    row = jnp.broadcast_to(row, numbers.shape)
    filled = splits.filled(is_retrieval, counts)[row]
    begin = number * splits.size(filled)
    return tuple(map(np.asarray, (row, begin, jnp.minimum(splits.size(filled), filled - begin))))


@pytest.mark.parametrize("is_retrieval", [True, False])
@pytest.mark.parametrize("lengths", [[0], [1], [1000], [0, 0], [17, 0, 1000, 16, 3], [0, 999, 0, 0, 48, 1, 0]])
def test_the_parts_of_a_row_are_its_keys_once_each(lengths, is_retrieval):
    row, begin, count = parts_of(MANY, lengths, is_retrieval=is_retrieval)
    for number, length in enumerate(lengths):
        keys = [key for i in np.flatnonzero(row == number) for key in range(begin[i], begin[i] + count[i])]
        assert keys == list(range(min(length, MANY.capacities[not is_retrieval])))
        assert (row == number).sum() <= MANY.parts
    assert (count > 0).all() and not (begin % MANY.block_k).any()


@pytest.mark.parametrize(
    "lengths",
    [[1 << 20, *[1000] * 31], [131072] * 8, [1 << 20], np.geomspace(1000, 1 << 20, 32).astype(int).tolist()],
    ids=["one_long_row", "equal_rows", "one_row", "rows_of_all_lengths"],
)
def test_programs_do_equal_work_whatever_the_lengths(lengths):
    """Keys of a program on average, of those of the program with the most; all run at once."""
    _, _, count = parts_of(SPLITS, lengths, is_retrieval=True)
    work = np.bincount(np.arange(len(count)) % SPLITS.programs, count, SPLITS.programs)
    print(f"{work.mean() / work.max():.1%} of {work.max():,.0f} keys")
    assert work.mean() > 0.9 * work.max()
