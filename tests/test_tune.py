"""The tuner writes the tiles that kernels then use; impossible tile sizes are left out, and altered ones refused."""

import json
import re

import jax
import pytest

from duo_jax import tune as tuner
from duo_jax.tune import candidates, kernels_here, tune
from pallas_kernels import tiles
from pallas_kernels.gpus import GPUS, find_gpu, tracing_for
from pallas_kernels.mosaic.warps import is_available
from pallas_kernels.tiles import KINDS, DecodeTiles, FlashTiles, PipelineTiles, tiles_for, trying, tuned_key

KEPT = {"a GPU of long ago": {"flash": {"64x2": {"block_q": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}}}}


def on(name):
    """Within it, programs are traced for a GPU."""
    return tracing_for(find_gpu(name))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The user's file of tiles, read again by each test."""
    monkeypatch.setenv("DUO_JAX_CACHE", str(tmp_path))
    tiles._tuned.cache_clear()
    yield tmp_path / "tiles.json"
    tiles._tuned.cache_clear()


@pytest.mark.full_matrix
def test_the_fastest_tiles_are_written_and_used(table, monkeypatch):
    table.write_text(json.dumps(KEPT))
    choices = [DecodeTiles(16, 256, 4, 4, 2), DecodeTiles(32, 256, 4, 4, 2)]
    monkeypatch.setattr(tuner, "candidates", lambda kernel, shipped: choices)
    monkeypatch.setattr(tuner, "QUESTION", 2)
    shown = []
    tune(("decode", "short"), (16,), tokens=1, context=300, show=shown.append)
    found = json.loads(table.read_text())
    key = f"cpu, jax {jax.__version__}, ptxas "
    assert found.pop(next(iter(KEPT))) == KEPT[next(iter(KEPT))]
    ((name, kernels),) = found.items()
    assert name.startswith(key)
    assert {kernel: list(sizes) for kernel, sizes in kernels.items()} == {
        "decode": ["16x2", "16x2q"],
        "short": ["16x2q"],
    }
    assert [line.partition(":")[0] for line in shown] == [
        "decode, bfloat16, head dim 16",
        "decode, bfloat16, head dim 16, int4 cache",
        "short, bfloat16, head dim 16, int4 cache",
    ]
    for quantized in (False, True):
        assert tiles_for("decode", 16, 2, quantized=quantized) in choices
    assert tiles_for("short", 16, 2, quantized=True) in choices
    assert tiles_for("decode", 16, 4) not in choices


def test_a_short_chunk_is_not_tuned_where_it_is_read_as_a_long_one(table):
    shown = []
    with pytest.raises(ValueError, match="no tiles of short run here"):
        tune(("short",), (16,), dtypes=("float32",), tokens=1, context=64, show=shown.append)
    assert "Unsupported: a short chunk is read as a long one with float32" in shown[0] and not table.exists()


def test_a_tile_is_as_small_as_a_page_needs(table):
    with on("h200"):
        for page, block_k in ((None, 64), (256, 64), (96, 32), (48, 16), (17, 16)):
            assert {tiles_for(name, 128, 2, page=page).block_k for name in ("flash", "decode", "short")} == {block_k}
            assert tiles_for("mosaic_flash", 128, 2, page=page).block_k == 128
        assert tiles_for("decode", 128, 2, page=48).min_split % 16 == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"cpu": {"flash"', ""),
        ("[]", "no attribute"),
        ('{"x": {"matmul": {"64x2": {}}}}', "no kernel 'matmul'"),
        ('{"x": {"flash": {"64x2": {"block_q": 64}}}}', "flash 64x2 needs block_q, block_k, num_warps, num_stages"),
    ],
)
def test_an_altered_table_is_refused_by_name(table, text, why):
    table.write_text(text)
    with pytest.raises(ValueError, match=rf"tiles.json is truncated or was altered .*{why}.*: delete it, then tune"):
        tiles_for("decode", 16, 2)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"min_split": 300}, "min_split must be a multiple of block_k=64 and of 8, got 300"),
        ({"block_k": 4, "min_split": 12}, "of 8, got 12"),
        ({"block_k": 48, "min_split": 96}, "block_k must be a power of two, got 48"),
        ({"block_k": 256}, "block_k must be a positive integer up to 128, got 256"),
        ({"num_warps": 3}, "num_warps must be a power of two"),
        ({"max_programs": 0}, "max_programs must be a positive integer up to 1048576, got 0"),
        ({"num_warps": 64}, "num_warps must be a positive integer up to 32, got 64"),
        ({"num_stages": True}, "num_stages must be a positive integer up to 16, got True"),
    ],
)
def test_tiles_that_no_kernel_takes_are_refused(table, changes, why):
    entry = {"block_k": 64, "min_split": 256, "max_programs": 64, "num_warps": 4, "num_stages": 2} | changes
    with pytest.raises(ValueError, match=re.escape(why)):
        DecodeTiles(**entry)
    table.write_text(json.dumps({"x": {"decode": {"16x2": entry}}}))
    with pytest.raises(ValueError, match=f"altered .decode 16x2: .*{re.escape(why)}"):
        tiles_for("decode", 16, 2)


def test_tuned_tiles_hold_for_the_chip_and_the_compilers_they_were_tuned_with(table, monkeypatch):
    monkeypatch.setattr(tiles, "ptxas_version", lambda backend: (12, 9, 86))
    tuned = {"block_q": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}
    key = f"sm_90, 132 SMs, 227 KiB, jax {jax.__version__}, ptxas 12.9.86"
    table.write_text(json.dumps({key: {"flash": {"128x2": tuned}}}))
    shipped = tiles_for("flash", 128, 2)
    for name in ("h100-80g", "h100-nvl", "gh200", "h200"):  # One chip, whatever the product.
        with on(name):
            assert tuned_key("flash") == key and tiles_for("flash", 128, 2) == FlashTiles(**tuned)
    for name in ("h100-pcie", "a100-80g"):
        with on(name):
            assert tiles_for("flash", 128, 2).block_q == shipped.block_q
    monkeypatch.setattr(tiles, "ptxas_version", lambda backend: (13, 1, 80))
    with on("h200"):
        assert tiles_for("flash", 128, 2) != FlashTiles(**tuned)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_tiles_of_every_kernel_and_few_candidates(name, table):
    with on(name):
        kernels = kernels_here()
        major, _ = capability = GPUS[name].capability
        assert ("mosaic_flash" in kernels) == (capability == (9, 0) or (major == 8 and is_available()))
        assert ("mosaic_decode" in kernels) == (capability == (9, 0))
        for kernel in kernels:
            for head_dim, itemsize in ((64, 2), (128, 2), (256, 2), (128, 4), (256, 4)):
                shipped = tiles_for(kernel, head_dim, itemsize)
                tried = list(candidates(kernel, shipped))
                assert isinstance(shipped, KINDS[kernel]) and tried[0] == shipped and 4 <= len(tried) <= 6
        assert tiles_for("decode", 128, 2).max_programs == 8 * GPUS[name].cores


def test_tiles_on_trial_are_used_only_within():
    on_trial, before = DecodeTiles(8, 16, 4, 1, 1), tiles_for("decode", 128, 2)
    with trying("decode", on_trial):
        assert tiles_for("decode", 128, 2) is on_trial
    assert tiles_for("decode", 128, 2) == before


def test_tiles_that_a_kernel_refuses_are_left_out(table, monkeypatch):
    monkeypatch.setattr(tuner, "candidates", lambda kernel, shipped: [PipelineTiles(16, 2)])
    shown = []
    with pytest.raises(ValueError, match="no tiles of mosaic_flash run here"):
        tune(("mosaic_flash",), (256,), tokens=16, context=300, show=shown.append)
    assert "Unsupported: the mosaic backend takes" in shown[0] and not table.exists()


@pytest.mark.parametrize("bad", [{"kernels": ("matmul",)}, {"context": 0}])
def test_bad_settings_are_refused(table, bad):
    with pytest.raises(ValueError, match=r"kernels are among flash|context must be at least 1"):
        tune(**{"kernels": ("flash",), "head_dims": (64,)} | bad)
