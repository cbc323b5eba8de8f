"""What phases must cost, the engines that are timed, and `duo bench` and `duo eval efficiency`, which time them."""

import json
from dataclasses import asdict, replace
from importlib.util import find_spec

import numpy as np
import pytest
from duo_eval.speed import efficiency
from duo_eval.speed.bench import Bench
from duo_eval.speed.bench_model import BenchModel
from duo_eval.speed.efficiency import Efficiency, Point
from duo_eval.speed.engines import ENGINES
from duo_eval.speed.engines.cudnn import Cudnn
from duo_eval.speed.engines.transformers import fields
from duo_eval.speed.roofline import decode_bytes, kv_bytes_read, prefill_flops, saving_realized, visible_pairs

from duo_jax import PRESETS, HeadPattern, ModelConfig


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
    assert kv_bytes_read(config, HeadPattern.full(config), **one) == 131072 * 1000
    assert kv_bytes_read(config, pattern, **one) == 65536 * 1000 + 65536 * 384
    assert (
        decode_bytes(config, HeadPattern.full(config), **one) == 2 * (8030261248 - 128256 * 4096) + 131072 * 1000
    )  # a row of the table is looked up


def test_prefill_counts_weights_and_pairs():
    config = PRESETS["llama-3-8b"]
    body = 8030261248 - 2 * 128256 * 4096
    expected = 2 * (body * 10 + 128256 * 4096) + 4 * 128 * 32 * 32 * 55
    assert prefill_flops(config, HeadPattern.full(config), batch_size=1, length=10) == expected
    assert prefill_flops(config, _half(), batch_size=3, length=10) == 3 * expected  # Shorter than the window.


def test_saving_realized_is_one_when_time_follows_cost():
    assert saving_realized(100.0, 60.0, 1000, 600) == pytest.approx(1)
    assert saving_realized(100.0, 100.0, 1000, 600) == 0


@pytest.mark.process
def test_bench_measures_and_resumes(text_model, duo, tmp_path):
    out = tmp_path / "bench.json"
    flags = ("--model", text_model, "--pattern", text_model / "pattern", "--contexts", 48, "--batch-sizes", 2)
    result = duo("bench", *flags, "--no-peer", "--out", out)
    assert result.code == 0, result
    record = json.loads(out.read_text())
    kinds = [(point["point"]["engine"], point["point"]["sparsity"]) for point in record["results"]]
    assert kinds == [("duo", None), ("duo", 0.5)]
    fields = ("prefill_seconds", "decode_ms", "prefill_floor_seconds", "decode_floor_ms", "decode_memory_bytes")
    assert all(point[field] > 0 for point in record["results"] for field in fields)
    assert record["results"][0]["kv_bytes"] > record["results"][1]["kv_bytes"]
    again = duo("bench", *flags, "--no-peer", "--out", out)
    assert again.code == 0 and again.out == "" and json.loads(out.read_text()) == record


class PlainCudnn(Cudnn):
    """The same engine around jax's own attention."""

    implementation = "xla"


def test_engines_compute_the_same_logits(text_model):
    model = BenchModel(str(text_model))
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, 20)).astype(np.int32)
    engines = [ENGINES["duo"], PlainCudnn] + ([ENGINES["transformers"]] if find_spec("torch") else [])
    found = []
    for kind in engines:
        engine = kind(model, HeadPattern.full(model.config), room=4)
        prompt = np.asarray(engine.prefill(tokens))
        found.append([prompt, *(np.asarray(engine.decode(tokens[:, column])) for column in range(2))])
        assert engine.kv_bytes > 0 and min(engine.memory().values()) > 0
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-4)


@pytest.mark.parametrize("name", ["gemma-3-270m", "qwen3-8b"])
def test_the_engine_of_transformers_has_the_layers_of_the_model(name):
    config = PRESETS[name]
    values = fields(config) | {"model_type": config.family, "dtype": config.dtype, "eos_token_id": config.eos_ids}
    assert ModelConfig.from_hf(values) == config


def test_engines_say_what_they_cannot_do(text_model):
    model = BenchModel(str(text_model))
    with pytest.raises(NotImplementedError, match="GPU"):
        Cudnn(model, HeadPattern.full(model.config), room=4)
    with pytest.raises(NotImplementedError, match="no streaming heads"):
        PlainCudnn(model, model.pattern(None, 0.5, None, None), room=4)


def test_a_preset_is_cut_and_says_so():
    model = BenchModel("llama-3-8b", layers=2)
    assert model.config.num_layers == 2 and model.name == "llama-3-8b, 2 of 32 layers"
    random = model.pattern(None, 0.5, None, None)
    assert (random.num_streaming, random.sink_size, random.recent_size) == (8, 128, 256)
    assert model.pattern(None, 0.5, 0, 4).sink_size == 0
    published = model.pattern("llama-3-8b-instruct-gradient-1048k", 0.25, None, None)
    whole = HeadPattern.load("llama-3-8b-instruct-gradient-1048k")
    assert published.num_streaming == 4 and np.array_equal(published.gates, whole.gates[:2])
    # Its last layers would fit this model, but it is another's.
    with pytest.raises(ValueError, match="another model"):
        BenchModel("llama-2-7b", layers=2).pattern("llama-3-8b-instruct-gradient-1048k", 0.5, None, None)


def test_what_does_not_fit_is_said_before_weights_are_made():
    point = Point("duo", "llama-3-70b", None, "float32", 1 << 30, 64)
    found = efficiency.measure_or_reason(**asdict(point))
    assert set(found) == {"cannot"} and "does not fit into memory: weights and cache take" in found["cannot"]


def test_efficiency_resumes_after_an_interrupt_and_after_what_does_not_fit(monkeypatch, tmp_path, capsys):
    asked = []

    def measured(point):
        asked.append(point)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"cannot": "does not fit into memory"} if point.context == 64 and len(asked) < 4 else dict(FOUND)

    monkeypatch.setattr(efficiency, "measured", measured)
    monkeypatch.setattr(efficiency, "in_fresh_process", lambda name: {"device": "a device", "platform": "cpu"})
    task = Efficiency(("smollm2-135m",), 1, contexts=(64, 128), chunk_sizes=(32,), peer=False, out=tmp_path / "e.json")
    with pytest.raises(KeyboardInterrupt):
        task.run()
    assert ["cannot" in result for result in json.loads(task.out.read_text())["results"]] == [True, True]
    task.run()
    results = json.loads(task.out.read_text())["results"]
    assert [result["point"]["context"] for result in results] == [64, 64, 128, 128]
    assert not any("cannot" in result for result in results)
    assert {result["point"]["chunk_size"] for result in results} == {32}
    printed = capsys.readouterr().out
    assert "smollm2-135m, 1 of 30 layers, duo 50% streaming: 64 tokens, batch 1, chunks of 32: does not fit" in printed
    assert "prefill 3.00 s (2.0 times its floor), decode 6.0 ms (3.0 times), 1.00 GB" in printed


FOUND = {
    "prefill_seconds": 3.0,
    "prefill_floor_seconds": 1.5,
    "decode_ms": 6.0,
    "decode_floor_ms": 2.0,
    "peak_memory_bytes": 10**9,
}


def test_points_of_other_settings_do_not_join_a_file(monkeypatch, tmp_path):
    cpu = {"device": "cpu", "platform": "cpu"}
    task = Efficiency(("llama-3-8b",), contexts=(64,), peer=False, out=tmp_path / "out.json")
    points = [asdict(point) for point in task._points("cpu")]
    record = task._record(cpu)
    with record.writing(device="cpu") as append:
        for point in points:
            append(point, {})
    assert task._record(cpu).results == [{"point": point} for point in points]
    for name, value in (("dtype", "bfloat16"), ("sink_size", 4), ("backend", "xla")):
        with pytest.raises(ValueError, match=f"other settings: {name} was"):
            replace(task, **{name: value})._record(cpu)
    assert len(replace(task, contexts=(64, 128))._record(cpu).results) == 2
    # The data type that a CPU has by default, and a file of the first release.
    assert not replace(task, dtype="float32")._record(cpu).missing(replace(task, dtype="float32")._points("cpu"))
    run = record.head["runs"][0]
    old = {"command": "duo eval efficiency", "machine": run["machine"], **cpu, "results": record.results}
    task.out.write_text(json.dumps(old))
    assert not task._record(cpu).missing(task._points("cpu"))
    bench = Bench(task.model, pattern=None, contexts=(64,), batch_sizes=(1,), peer=False, out=tmp_path / "bench.json")
    bench.out.write_text(json.dumps(old | {"command": "duo bench"}))
    assert not bench._record(cpu).missing(bench._points("cpu"))
    bench.out.write_text(json.dumps(old | {"command": "duo bench", "results": [{}]}))
    with pytest.raises(ValueError, match="not a result of this command"):
        bench._record(cpu)
    with pytest.raises(ValueError, match="another machine, versions or commit"):
        task._record({"device": "gpu", "platform": "gpu"})


def test_bench_refuses_what_it_cannot_do(text_model, duo, tmp_path):
    (tmp_path / "other.json").write_text("[]")
    for flags, word in (
        (("--contexts", "0"), "at least 1"),
        (("--out", tmp_path / "other.json"), "other.json must contain a JSON object"),
        (("--out", tmp_path / "other.json" / "x.json"), "other.json"),
        (("--layers", "1"), "cuts presets"),
        (("--model", "llama-3-8b", "--pattern", "None", "--layers", "33"), "in [1, 32]"),
        (("--backend", "cuda"), "--backend must be one of"),
        (("--model", "nowhere"), "no model"),
    ):
        result = duo("bench", "--model", text_model, "--pattern", text_model / "pattern", *flags)
        assert result.code == 2 and word in result.err and "Traceback" not in result.err, result
