"""`duo eval keys`: errors of quantized caches by kind of keys, as a file and as a table."""

import json

from duo_eval.show.registry import type_of
from duo_eval.tasks.keys import KINDS, keys_table

from tests.text_models import assert_refused


def test_a_large_key_bias_costs_no_more_than_a_small_one(duo, tmp_path, monkeypatch):
    monkeypatch.delitem(KINDS, "qwen3")  # Each kind of model takes seconds to compile.
    out = tmp_path / "keys.json"
    options = ("--caches", "int8", "int4", "--head-dims", 64, "--tokens", 192, "--models", 1)
    assert duo("eval", "keys", "--out", out, *options).code == 0
    results = json.loads(out.read_text())["results"]
    error = {(each["keys"], each["cache"]): each["error"][0] for each in results}
    assert len(error) == 2 * len(KINDS)
    for cache in ("int8", "int4"):
        assert 0 < error["qwen2, bias 921", cache] < 2 * error["qwen2, bias 22", cache]
    assert error["llama", "int8"] < error["llama", "int4"] / 4
    kind = type_of(out)
    assert kind is not None and kind.matches(json.loads(out.read_text()))
    assert keys_table(out).count("\n|") == len(KINDS) + 1


def test_what_cannot_be_measured_is_refused(duo, tmp_path):
    assert_refused(duo("eval", "keys", "--out", tmp_path / "keys.json", "--caches", "int3"), "cache must be one of")
    assert_refused(duo("eval", "keys", "--out", tmp_path / "keys.json", "--tokens", 1), "2 tokens")
