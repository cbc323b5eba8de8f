"""The tuner writes the tiles that kernels then use; impossible tile sizes are left out."""

import json

import pytest
from duo_eval.aot import tune
from duo_eval.aot.tune import Tune

from pallas_kernels import tiles
from pallas_kernels.tiles import DecodeTiles, PipelineTiles, tiles_for, trying


@pytest.mark.full_matrix
def test_the_fastest_tiles_are_written_and_used(tmp_path, monkeypatch):
    table = tmp_path / "tiles.json"
    table.write_text(json.dumps({"NVIDIA Abacus": {"flash": {"64x2": {}}}}))
    wrong, right = DecodeTiles(24, 264, 64, 4, 2), DecodeTiles(32, 256, 64, 4, 2)  # Pallas needs powers of two
    monkeypatch.setattr(tune, "candidates", lambda kernel: [wrong, right])
    Tune(kernels=("decode",), head_dims=(16,), tokens=1, context=300, out=table).run()
    found = json.loads(table.read_text())
    assert found["NVIDIA Abacus"] == {"flash": {"64x2": {}}}
    assert found["cpu"]["decode"].keys() == {"16x2"}
    monkeypatch.setattr(tiles, "_tuned", lambda: found)
    assert tiles_for("decode", 16, 2) in (wrong, right)
    assert tiles_for("decode", 16, 4) == tiles._default("decode", 16, 4, False)


def test_a_truncated_table_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("DUO_JAX_CACHE", str(tmp_path))
    (tmp_path / "tiles.json").write_text('{"cpu": {"flash"')
    tiles._tuned.cache_clear()  # A failure is not kept.
    with pytest.raises(ValueError, match=r"tiles.json is truncated or was altered .*: delete it, then tune again"):
        tiles_for("decode", 16, 2)


def test_tiles_on_trial_are_used_only_within():
    on_trial, before = DecodeTiles(8, 16, 4, 1, 1), tiles_for("decode", 128, 2)
    with trying("decode", on_trial):
        assert tiles_for("decode", 128, 2) is on_trial
    assert tiles_for("decode", 128, 2) == before


def test_tiles_that_a_kernel_refuses_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "candidates", lambda kernel: [PipelineTiles(16, 2)])
    with pytest.raises(ValueError, match="no tiles of mosaic_flash run here"):
        Tune(kernels=("mosaic_flash",), head_dims=(256,), tokens=16, context=300, out=tmp_path / "tiles.json").run()
    assert "Unsupported: the mosaic backend takes" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [{"kernels": ("matmul",)}, {"context": 0}])
def test_bad_settings_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"kernels are among flash|context must be at least 1"):
        Tune(out=tmp_path / "tiles.json", **bad).run()
