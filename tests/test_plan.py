"""The planner: exact bytes, the longest context that fits, and clear refusals of one that does not."""

import json
from dataclasses import replace

import pytest
from duo_eval.aot.context import ContextTask, MeshesTask, mesh_table, planned

from duo_jax import PRESETS, KVCache, Model, Plan
from duo_jax.cli.options import RoomOptions, parse_bytes
from duo_jax.generation.chunks import most_at_a_time
from duo_jax.plan import any_pattern, weight_bytes
from pallas_kernels.gpus import GPUS, find_gpu, tracing_for
from tests.shapes import TINY
from tests.text_models import assert_refused

LLAMA = PRESETS["llama-3-8b"]
W8 = replace(LLAMA, weight_dtype="int8")
HALF = any_pattern(LLAMA, 0.5)


def test_the_paper_s_setting_passes_the_paper_s_tokens():
    """A token takes 18,944 bytes; the paper reports 3.30M and 1.84M tokens."""
    duo = Plan(W8, HALF, chunk_size=4096, kv_dtype="int4")
    assert duo.kv_per_token == 18_944
    assert duo.max_context(80 * 10**9) > 3_700_000
    assert replace(duo, pattern=None).max_context(80 * 10**9) > 1_840_000
    assert duo.max_context(GPUS["h200"].usable_bytes) > 6_500_000


@pytest.mark.parametrize("kv_dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("sparsity", [None, 0.25, 1.0])
def test_the_longest_context_fits_and_one_token_more_does_not(kv_dtype, sparsity):
    pattern = None if sparsity is None else any_pattern(LLAMA, sparsity)
    plan = Plan(LLAMA, pattern, batch_size=3, kv_dtype=kv_dtype)
    most = plan.max_context(80 * 10**9)
    assert plan.total(most) <= 80 * 10**9
    if sparsity == 1.0:
        assert most == 2**31 - 1
    else:
        assert plan.total(most + 1) > 80 * 10**9
        with pytest.raises(ValueError, match=rf"what would fit: up to {most} tokens"):
            plan.check(most + 1, 80 * 10**9)
    plan.check(most, 80 * 10**9)
    assert plan.max_context(plan.weights) == 0


def test_weights_are_counted_as_they_are():
    three = replace(TINY, weight_dtype="int8", num_layers=3)
    assert weight_bytes(three) == Model.random(three).nbytes
    high = 2 * (2 * LLAMA.vocab_size * LLAMA.embed_dim)
    linear = LLAMA.num_parameters - high / 2
    # A scale of 16 bits for each output, or for each 64 inputs of it.
    for dtype, bytes_each in (("int8", 1), ("int4", 0.5 + 2 / 64)):
        found = weight_bytes(replace(LLAMA, weight_dtype=dtype))
        assert found == pytest.approx(high + linear * bytes_each, rel=1e-3)


def test_a_quantized_cache_counts_what_prefill_unpacks_at_a_time():
    """65,536 keys and values of all rows, at least 8,192 of each; it matters where a chunk needs less by itself."""
    plain, size = Plan(LLAMA, HALF, chunk_size=512), 2 if LLAMA.dtype == "bfloat16" else 4
    one_row, rows = (replace(plain, kv_dtype="int4", batch_size=count).activations for count in (1, 16))
    keys = 2 * LLAMA.num_kv_heads * LLAMA.head_dim * size
    assert plain.activations < 65_536 * keys < one_row < 1.3 * 65_536 * keys
    assert 16 * 8192 * keys < rows < 3 * 16 * 8192 * keys
    large = replace(plain, chunk_size=32_768)
    assert replace(large, kv_dtype="int4").activations == large.activations


def test_what_does_not_fit_is_refused_with_the_nearest_setting_that_would():
    plan = Plan(LLAMA, HALF)
    with pytest.raises(ValueError, match=r"needs \d+\.\d+ GB \(weights .*, KV cache .*, activations .*kv_dtype=int8"):
        plan.check(1_500_000, 80 * 10**9)
    with pytest.raises(ValueError, match="kv_dtype=int4 and weight_dtype=int8"):
        plan.check(3_600_000, 80 * 10**9)
    with pytest.raises(ValueError, match=r"at least 16\.\d+ GB of memory for a first token"):
        plan.check(1_500_000, 4 * 10**9)
    with pytest.raises(ValueError, match="chunk_size=1024"):
        replace(plan, chunk_size=32_768).check(65_536, 23 * 10**9)


def test_a_plan_is_for_the_chunks_that_prefill_takes_here():
    assert Plan(LLAMA, HALF, 4).chunk_size == most_at_a_time(4) == 1024
    with tracing_for(find_gpu("h200")):
        assert [Plan(LLAMA, HALF, rows).chunk_size for rows in (1, 4)] == [8192, 2048]


def test_a_cache_takes_what_memory_holds_and_no_more(tiny, half):
    memory = 100_000
    cache = KVCache.init(tiny.config, half, 2, memory=memory)
    assert cache.nbytes <= memory < KVCache.bytes_for(tiny.config, half, 2, cache.max_length + 1)
    assert KVCache.init(tiny.config, half, 2, 7, memory=memory).max_length == 7
    with pytest.raises(ValueError, match=f"up to {cache.max_length} tokens, stream more heads"):
        KVCache.init(tiny.config, half, 2, cache.max_length + 1, memory=memory)
    with pytest.raises(ValueError, match="give more memory"):
        KVCache.init(tiny.config, half, 2, memory=100)
    with pytest.raises(ValueError, match="give max_length"):
        KVCache.init(tiny.config, half, 2)


def test_sizes_are_read_as_they_are_written():
    assert parse_bytes("80GB") == 80 * 10**9 and parse_bytes("1.5 GiB") == 3 << 29 and parse_bytes("100") == 100
    for wrong in ("80 apples", "GB", "-1GB", "0"):
        with pytest.raises(ValueError, match="such as 80GB"):
            parse_bytes(wrong)


def test_every_gpu_has_a_capability_and_less_than_is_sold():
    for gpu in GPUS.values():
        assert gpu.capability >= (8, 0)
        assert 0.9 < gpu.usable_bytes / gpu.memory_bytes < 1
    # GB of memory as data sheets have them; CUDA reports a little less, in bytes.
    sold = {"a100-80g": 80, "a100-40g": 40, "h100-80g": 80, "h100-pcie": 80, "h100-nvl": 94, "gh200": 96, "h20": 96}
    sold |= {"gh200-144g": 144, "h200": 141, "b200": 180, "a10": 24, "a10g": 24, "l40s": 48}
    sold |= {"a30": 24, "a40": 48, "l4": 24, "l40": 48, "rtx-a6000": 48, "rtx-6000-ada": 48, "rtx-pro-6000": 96}
    sold |= {"rtx-3090": 24, "rtx-4090": 24, "rtx-5090": 32}
    assert sold.keys() == GPUS.keys()
    for name, size in sold.items():
        assert 0.91 * size < GPUS[name].memory_bytes / 2**30 <= size, name


def test_the_command_plans_in_text_and_json(duo):
    options = ("plan", "--model", "llama-3-8b", "--sparsity", 0.5, "--kv-dtype", "int4", "--weight-dtype", "int8")
    text = duo(*options, "--memory", "80GB", "--chunk", 4096)
    assert text.code == 0 and "50% stream" in text.out and "longest context" in text.out
    found = json.loads(duo(*options, "--memory", "80GB", "--chunk", 4096, "--json").out)
    plan = Plan(W8, HALF, chunk_size=4096, kv_dtype="int4")
    assert found["max_context"] == plan.max_context(80 * 10**9) > found["full_attention"]["max_context"]
    assert found["total"] == plan.total(found["max_context"]) == found["weights"] + found["kv"] + found["activations"]
    by_gpu = json.loads(duo(*options, "--gpu", "A100-80G", "--json").out)
    assert by_gpu["memory"] == GPUS["a100-80g"].usable_bytes
    smallest = json.loads(duo(*options, "--context", 1_000_000, "--json").out)
    assert smallest["total"] == replace(plan, chunk_size=1024).total(1_000_000)


def test_contexts_beyond_the_trained_positions_are_reported(duo):
    beyond = "The model was trained for 8192 tokens: expect worse answers beyond that."
    plan = ("plan", "--model", "llama-3-8b")
    assert beyond in duo(*plan, "--context", "8193").out and beyond in duo(*plan, "--memory", "80GB").out
    assert beyond not in duo(*plan, "--context", "8192").out
    assert json.loads(duo(*plan, "--context", "8192", "--json").out)["trained_positions"] == 8192


def test_the_command_refuses_what_does_not_fit_or_make_sense(duo):
    options = ("plan", "--model", "llama-3-8b")
    assert_refused(duo(*options, "--memory", "80GB", "--context", 1_800_000), "what would fit", "kv_dtype=int4")
    assert_refused(duo(*options, "--memory", "10GB"), "what would fit: weight_dtype=int8")
    assert_refused(duo(*options, "--memory", "1GB"), "of memory for a first token")
    assert_refused(duo(*options), "--memory 80GB or --gpu")
    assert_refused(duo(*options, "--gpu", "abacus"), "unknown GPU", "a100-80g")
    assert_refused(duo(*options, "--memory", "80GB", "--verify"), "give --gpu")


def test_a_plan_that_is_off_is_reported_and_fails(duo, monkeypatch):
    def off(plan, length, gpu, backend):
        return {"gpu": gpu, "backend": backend, "context": length, "programs": {}, "total": 100, "planned": 104} | {
            "deviation": 0.04
        }

    monkeypatch.setattr("duo_eval.aot.plan.verify", off)
    result = duo("plan", "--model", "llama-3-8b", "--gpu", "h200", "--verify")
    assert result.code == 2 and "planned" in result.out
    assert "+4.0% off the compiler's figure, more than 3%" in result.err


def test_generate_refuses_before_it_loads(text_model, duo):
    options = ("generate", "--model", text_model, "--prompt", "Hello", "--max-new-tokens", 4)
    assert_refused(duo(*options, "--memory", "20KB"), "a context of", "what would fit")
    assert_refused(duo(*options, "--max-context", 5), "more than --max-context 5")
    assert_refused(duo(*options, "--max-context", 10**9), "a context of", "GB")
    assert_refused(duo(*options, "--max-context", 10**11), "--max-context must be at most 2147483647")


def test_room_is_what_is_asked_for_or_what_fits():
    plan = Plan(TINY, chunk_size=16)
    assert RoomOptions(max_context="max", memory="1MB").tokens(plan, 8) == plan.max_context(10**6) > 1000
    assert RoomOptions(max_context=100, memory="1MB").tokens(plan, 8) == 100
    with pytest.raises(ValueError, match="what would fit"):
        RoomOptions(max_context="max", memory="1MB").tokens(plan, 10**6)


@pytest.mark.full_matrix
def test_the_table_keeps_what_was_compiled(monkeypatch, tmp_path):
    """A cell that was compiled with the same plan is not compiled again."""
    calls = []

    def compiled(plan, length, gpu):
        calls.append(length)
        return {"planned": plan.total(length), "total": plan.total(length), "deviation": 0.0}

    monkeypatch.setattr("duo_eval.aot.context.verify", compiled)
    task = ContextTask(models=("llama-3-8b",), dtypes=("bf16", "KV4"), out=tmp_path / "plan.json")
    task.run()
    task.run()
    record = json.loads((tmp_path / "plan.json").read_text())
    assert len(calls) == 4 == len(record["results"])
    duo = planned("llama-3-8b", "KV4", True, 4096)
    assert record["results"][-1]["context"] == duo.max_context(GPUS["a100-80g"].usable_bytes)
    (saving,) = record["savings"]
    assert saving["saving"] >= saving["goal"] - 0.1 and saving["goal_passed_at"] > 1000


def test_cases_that_a_file_contains_are_not_compiled_again(monkeypatch, tmp_path, capsys):
    calls, out = [], tmp_path / "families.json"

    def compiled(plan, length, gpu):
        calls.append(plan.config.family)
        return {"planned": plan.total(length), "total": plan.total(length), "deviation": 0.0, "context": length}

    monkeypatch.setattr("duo_eval.aot.context.verify", compiled)
    MeshesTask(("gpt-oss",), chunk=8192, out=out).run()
    for _ in range(2):
        MeshesTask(("gpt-oss", "gemma3"), chunk=8192, out=out).run()
    assert calls == ["gpt_oss", "gemma3_text"] and "has all of these cases" in capsys.readouterr().out
    assert "| 1 x h200 | gpt-oss-120b | mxfp4" in mesh_table(out) and "gemma-3-27b" in mesh_table(out)
