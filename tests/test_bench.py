import json

import numpy as np
import pytest

from duo_jax import PRESETS, HeadPattern
from eval.costs import decode_bytes, kv_bytes_read, prefill_flops, saving_realized, visible_pairs


def _half() -> HeadPattern:
    return HeadPattern.load("llama-3-8b-instruct-gradient-1048k", sparsity=0.5)


def test_visible_pairs_are_those_of_the_mask():
    for length, capacity in ((7, 3), (3, 7), (5, 5), (1, 1)):
        # Every token after the first `capacity` sees exactly that many.
        mask = np.tri(length, dtype=bool) & ~np.tri(length, k=-capacity, dtype=bool)
        assert visible_pairs(length, capacity) == mask.sum()


def test_a_decode_step_reads_the_bytes_that_the_paper_counts():
    config, pattern = PRESETS["llama-3-8b"], _half()
    one = {"batch_size": 1, "length": 1000, "itemsize": 2}
    assert kv_bytes_read(config, None, **one) == 131072 * 1000
    assert kv_bytes_read(config, pattern, **one) == 65536 * 1000 + 65536 * 384
    assert (
        decode_bytes(config, None, **one) == 2 * (8030261248 - 128256 * 4096) + 131072 * 1000
    )  # a row of the table is looked up


def test_prefill_counts_weights_and_pairs():
    config = PRESETS["llama-3-8b"]
    body = 8030261248 - 2 * 128256 * 4096
    expected = 2 * (body * 10 + 128256 * 4096) + 4 * 128 * 32 * 32 * 55
    assert prefill_flops(config, None, batch_size=1, length=10) == expected
    assert prefill_flops(config, _half(), batch_size=3, length=10) == 3 * expected  # Shorter than the window.


def test_saving_realized_is_one_when_time_follows_cost():
    assert saving_realized(100.0, 60.0, 1000, 600) == pytest.approx(1)
    assert saving_realized(100.0, 100.0, 1000, 600) == 0


def test_bench_measures_and_resumes(text_model, duo, tmp_path):
    out = tmp_path / "bench.json"
    flags = ("--model", text_model, "--pattern", text_model / "pattern", "--contexts", 48, "--batch-sizes", 2)
    result = duo("bench", *flags, "--no-peer", "--out", out)
    assert result.code == 0, result
    record = json.loads(out.read_text())
    kinds = [(point["point"]["engine"], point["point"]["sparsity"]) for point in record["results"]]
    assert kinds == [("duo", None), ("duo", 0.5)]
    assert all(point["prefill_seconds"] > 0 and point["decode_ms"] > 0 for point in record["results"])
    assert record["results"][0]["kv_bytes"] > record["results"][1]["kv_bytes"]
    again = duo("bench", *flags, "--no-peer", "--out", out)
    assert again.code == 0 and again.out == "" and json.loads(out.read_text()) == record


def test_bench_refuses_what_it_cannot_do(text_model, duo, tmp_path):
    (tmp_path / "other.json").write_text("[]")
    for flags, word in (
        (("--contexts", "0"), "at least 1"),
        (("--out", tmp_path / "other.json"), "not a result of this command"),
        (("--out", tmp_path / "other.json" / "x.json"), "other.json"),
    ):
        result = duo("bench", "--model", text_model, *flags)
        assert result.code == 2 and word in result.err and "Traceback" not in result.err, result
