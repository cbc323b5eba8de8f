"""A training run stores its attention backends and tiles, and resumes with them or not at all."""

import json

import pytest
from duo_train import backends
from duo_train.backends import chosen, resumed
from duo_train.identify import RUN_FILE

from duo_jax.certified import training
from pallas_kernels import Unsupported, ops
from pallas_kernels.certify import verdicts
from pallas_kernels.certify.verdicts import Found, Verdict, key_of
from pallas_kernels.choices import here, repeating
from pallas_kernels.gpus import find_gpu, tracing_for
from pallas_kernels.tiles import tiles_for
from tests.shapes import TINY
from tests.test_identify import identify  # noqa: F401
from tests.text_models import assert_refused

REQUESTS = training(TINY)
FULL, WINDOW = "training", "training, window 128+256"
RIGHT, FASTER, WRONG = Verdict(True, "", 1e-3, 1e-3), Verdict(True, "", 1e-3, 1e-4), Verdict(False, "hangs")


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Traces for a GPU on which there are verdicts."""
    monkeypatch.setenv("DUO_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv("DUO_BACKEND", raising=False)

    def enter(name, **found):
        device = {"kind": find_gpu(name).name}
        monkeypatch.setattr(verdicts, "device", lambda: device)
        verdicts.forget()
        verdicts.agree_on(Found({key_of(request): found for request in REQUESTS}, set(), device))
        return tracing_for(find_gpu(name))

    yield enter
    verdicts.forget()


def test_a_run_repeats_its_backends_and_tiles_where_it_was(on, tmp_path, capsys):
    path = tmp_path / RUN_FILE
    with on("h200", triton=RIGHT, xla=RIGHT):
        begun = chosen(REQUESTS, None)
        assert begun["device"] == "NVIDIA H200" and begun["choices"].keys() == {FULL, WINDOW}
        assert {choice["backend"] for choice in begun["choices"].values()} == {"triton"}
        assert resumed(path, [], REQUESTS, None) == [begun]
        begun["choices"][FULL]["tiles"]["flash"] |= {"block_q": 32}
        begun["choices"][WINDOW]["tiles"]["flash"] |= {"block_q": 32}
        assert resumed(path, [begun], REQUESTS, None) == [begun]
        shipped = tiles_for("flash", 16, 4)
        with repeating(begun["choices"]):
            assert tiles_for("flash", 16, 4).block_q == 32 != shipped.block_q
        assert tiles_for("flash", 16, 4) == shipped
    assert not capsys.readouterr().err
    # Another backend has become faster since: the run does not change.
    with on("h200", triton=RIGHT, xla=FASTER):
        assert resumed(path, [begun], REQUESTS, None) == [begun]
        assert ops.choose(here(REQUESTS[0])).name == "xla"
        with repeating(begun["choices"]):
            assert ops.choose(here(REQUESTS[0])).name == ops.choose(here(REQUESTS[1])).name == "triton"
    slow = chosen(REQUESTS, "xla")
    with on("h200", triton=RIGHT, xla=RIGHT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "best", lambda request, names: "triton")
        assert resumed(path, [slow | {"device": "NVIDIA H200"}], REQUESTS, None)[-1]["choices"] == slow["choices"]
    assert "triton is faster here (DUO_BACKEND=triton)" in capsys.readouterr().err


def test_elsewhere_a_backend_must_have_been_found_right(on, tmp_path, monkeypatch):
    path = tmp_path / RUN_FILE
    with on("h200", triton=RIGHT, xla=RIGHT):
        begun = chosen(REQUESTS, None)
    with on("a100-80g", triton=RIGHT, xla=RIGHT):
        first, second = resumed(path, [begun], REQUESTS, None)
        assert first == begun and second["device"] == "NVIDIA A100-SXM4-80GB"
        assert second["choices"].keys() == begun["choices"].keys()
    for found, why in (({}, "was not found to be right on NVIDIA A100"), ({"triton": WRONG}, r"is not right .*hangs")):
        with on("a100-80g", **found), pytest.raises(Unsupported, match=f"the triton backend, which {why}.*DUO_BACKEND"):
            resumed(path, [begun], REQUESTS, None)
    with on("h200", triton=WRONG), pytest.raises(Unsupported, match="is not right on NVIDIA H200"):
        resumed(path, [begun], REQUESTS, None)
    with pytest.raises(
        Unsupported, match=r"the triton backend, which is for GPUs, this is cpu: resume it where it can"
    ):
        resumed(path, [begun], REQUESTS, None)
    monkeypatch.setenv("DUO_BACKEND", "xla")
    _, now = resumed(path, [begun], REQUESTS, None)
    assert now == chosen(REQUESTS, "xla") and resumed(path, [begun, now], REQUESTS, None) == [begun, now]


@pytest.mark.parametrize(
    "entry",
    [
        *({}, [], None, {"device": "cpu", "choices": {}}, {"device": 3, "choices": {}}, {"device": "cpu"}),
        {"device": "cpu", "choices": {FULL: "xla"}},
        {"device": "cpu", "choices": {FULL: {"backend": "xla", "tiles": {"flash": {"block_q": 3}}}}},
        {"device": "cpu", "choices": {FULL: {"backend": "xla", "tiles": {"matmul": {}}}}},
    ],
)
def test_an_altered_entry_is_refused(tmp_path, entry, annotations_off):
    with pytest.raises(ValueError, match=r"run.json.* altered: choose another folder"):
        resumed(tmp_path / RUN_FILE, [entry], REQUESTS, None)
    for whole in ("xla", {"device": "cpu", "choices": {}}):
        with pytest.raises(ValueError, match="altered"):
            resumed(tmp_path / RUN_FILE, whole, REQUESTS, None)


def test_the_command_refuses_before_it_loads(identify, tmp_path, monkeypatch):  # noqa: F811
    """A resume is refused before the model is loaded, unless DUO_BACKEND names another backend."""
    assert identify("--distill.steps", "1").code == 0
    path = tmp_path / "run" / RUN_FILE
    settings = json.loads(path.read_text())
    (begun,) = settings["backends"]
    before = {name: {"backend": "triton", "tiles": {}} for name in begun["choices"]}
    path.write_text(json.dumps(settings | {"backends": [{"device": "NVIDIA H200", "choices": before}]}))
    with monkeypatch.context() as patch:
        patch.setattr("duo_train.identify.Identify.prepare", None)
        assert_refused(
            identify("--resume"), "run was computed with the triton backend, which is for GPUs", "DUO_BACKEND"
        )
    monkeypatch.setenv("DUO_BACKEND", "xla")
    resumed = identify("--resume")
    assert resumed.code == 0 and "resuming with other attention backends, as DUO_BACKEND says" in resumed.err
    assert json.loads(path.read_text())["backends"][1] == begun
