"""The writer: whole or not at all, in the place that was named, and nothing of anyone else's is lost."""

import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from duo_eval.show.report.command import is_report
from duo_eval.show.result_type import ResultType
from duo_eval.show.tables import RESULTS
from duo_train.identify import check_folder

from duo_jax import HeadPattern, files
from duo_jax.figures import figure_bytes, is_figure
from tests.text_models import assert_refused

PATTERN = HeadPattern.from_gates(np.array([[1.0, 0.0], [0.0, 1.0]]), sink_size=3, recent_size=8)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_with_its_mode(tmp_path):
    path, mine = tmp_path / "a.txt", tmp_path / "a.txt.part"
    mine.write_text("mine")
    files.write_text(path, "one")
    path.chmod(0o640)
    files.write_text(path, "two\r\n")
    assert path.read_bytes() == b"two\r\n" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert mine.read_text() == "mine" and names(tmp_path) == ["a.txt", "a.txt.part"]


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    target, link, dangling = tmp_path / "real" / "a.txt", tmp_path / "link", tmp_path / "dangling"
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to(Path("real") / "new.txt")
    for path in (link, dangling):
        files.write_text(path, "new")
        assert path.is_symlink() and path.read_text() == "new"
    assert names(tmp_path / "real") == ["a.txt", "new.txt"]
    link.unlink()
    link.symlink_to(link)  # A loop.
    with pytest.raises(ValueError, match="leads back to itself"):
        files.write_text(link, "new")


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "inside a file", "read only"])
def test_places_that_are_no_file_are_refused_before_the_work(kind, tmp_path, monkeypatch):
    path, message = tmp_path / "a.txt", kind
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
        message = "a pipe or a device"
    elif kind == "device":
        path.symlink_to("/dev/null")
        message = "a pipe or a device"
    elif kind == "inside a file":
        (tmp_path / "file").write_text("mine")
        path, message = tmp_path / "file" / "b" / "a.txt", "file is not a folder"
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
        message = "cannot be written to"
    before = names(tmp_path)
    for check in (files.check_output, lambda path: files.write_text(path, "new")):
        with pytest.raises((ValueError, PermissionError), match=re.escape(message)):
            check(path)
    assert names(tmp_path) == before


@pytest.mark.parametrize("suffix", files.PACKED)
def test_a_name_that_would_be_read_as_packed_is_refused(suffix, tmp_path):
    with pytest.raises(ValueError, match=f"leave out {suffix}"):
        files.check_output(tmp_path / f"out.jsonl{suffix}", force=True)


class Full:
    """A file on a full disk."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch):
    opened = Path.open

    def open_full(path, mode="r", **options):
        file = opened(path, mode, **options)
        return file if mode in ("r", "rb") else Full(file)

    monkeypatch.setattr(Path, "open", open_full)


@pytest.mark.parametrize("write", [lambda path: files.write_text(path, "new text"), PATTERN.save])
def test_a_full_disk_is_reported_with_the_file(write, tmp_path, full_disk):
    path = tmp_path / "a"
    with pytest.raises(OSError, match=r"No space left on device: '.*/a") as error:
        write(path)
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.rglob("*.part"))


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "a.txt"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"):
        files.write_text(path, "new")
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"):
        files.append_text(path, "new")
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_is_written_whole_and_what_a_kill_left_is_removed(tmp_path):
    path = tmp_path / "cache"
    others = [".cache.int8.0123456789abcdef.part", ".cache.mine.part", ".other.0123456789abcdef.part"]
    for name in (".cache.0123456789abcdef.part", *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / files.UNFINISHED).touch()
    (tmp_path / ".cache.ffffffffffffffff.part").mkdir()  # Without the mark.
    path.mkdir()  # An empty folder is free.
    with files.whole_folder(path) as part:
        (part / "a").write_text("new")
    assert names(path) == ["a"]
    kept = sorted([".cache.ffffffffffffffff.part", *others, "cache"])
    assert names(tmp_path) == kept
    with pytest.raises(FileExistsError, match="exists already"), files.whole_folder(path):
        pass
    with pytest.raises(KeyError), files.whole_folder(tmp_path / "b"):
        raise KeyError
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/b'"),
        files.whole_folder(tmp_path / "b") as part,
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part / "x"))
    with pytest.raises(PermissionError, match=r"Permission denied: '/other/file'"), files.whole_folder(tmp_path / "b"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/other/file")
    assert names(tmp_path) == kept


def test_a_pattern_replaces_only_a_pattern(tmp_path, text_model):
    model = (text_model / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"config\.json exists and is not a pattern's"):
        PATTERN.save(text_model)
    assert (text_model / "config.json").read_bytes() == model and not (text_model / "full_attention_heads.tsv").exists()
    for _ in range(2):
        PATTERN.save(tmp_path / "p")
    (tmp_path / "p" / "full_attention_heads.tsv").unlink()  # As an interrupted save leaves it.
    PATTERN.save(tmp_path / "p")
    assert np.array_equal(HeadPattern.load(tmp_path / "p").gates, PATTERN.gates)
    for text in ("[]", "{", "mine", '{"sink_size": 1}'):
        (tmp_path / "p" / "config.json").write_text(text)
        with pytest.raises(FileExistsError):
            PATTERN.save(tmp_path / "p")
        assert (tmp_path / "p" / "config.json").read_text() == text


def test_identify_starts_where_a_kill_left_only_temporary_files(tmp_path):
    (tmp_path / ".run.json.0123456789abcdef.part").touch()
    check_folder(tmp_path, {}, resume=False)
    (tmp_path / "thesis.part").touch()
    with pytest.raises(ValueError, match="not empty"):
        check_folder(tmp_path, {}, resume=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "must contain a JSON object"), ("{}", "not the file of a run"), ("[" * 9999, "levels"), ("\n", "not JSON")],
)
def test_a_run_of_another_shape_is_refused(text, message, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=rf"run\.json.*{message}.*choose another folder"):
        check_folder(tmp_path, {}, resume=True)


def test_after_the_work_a_figure_of_someone_else_stays(tmp_path, monkeypatch, capsys):
    figure = tmp_path / "a: b.png"
    figure.write_bytes(b"mine")
    monkeypatch.setattr(ResultType, "save_figures", lambda self, path: files.check_output(figure, is_figure))
    ResultType("a type", lambda first: True).show_figures(tmp_path / "a.jsonl")
    printed = capsys.readouterr().err
    assert printed == (
        f"{figure} exists, and this command did not write it: keeping it; `duo eval plot --force` replaces it\n"
    )


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_figures_are_recognized(kind):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2])
    assert is_figure(figure_bytes(figure, kind)[: files.HEAD])
    assert not is_figure(b"mine") and not is_figure(b"duo-jax") and not is_report(b"<!DOCTYPE html><title>mine</title>")


PUBLISHED = "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("args", "flag", "name"),
    [
        (("plot", "gates", PUBLISHED), "--out", "gates.png"),
        (("plot", "gates", PUBLISHED), "--out", "gates.svg"),
        (("inspect", "--model", "llama-3-8b", "--pattern", "llama-3-8b-instruct-gradient-1048k"), "--png", "heads.png"),
        (("report", "--results"), "--out", "thesis.html"),
    ],
    ids=["png", "svg", "heads", "report"],
)
def test_files_of_others_are_replaced_only_by_force(args, flag, name, duo, tmp_path):
    if args[0] == "report":
        (tmp_path / "results").mkdir()
        shutil.copy(RESULTS / "cpu" / "startup.json", tmp_path / "results")
        args = (*args, tmp_path / "results")
    path = tmp_path / name
    path.write_text("mine")
    done = duo(*args, flag, path)
    assert_refused(done, name, "this command did not write it", "--force")
    assert path.read_text() == "mine" and len(names(tmp_path)) == 1 + (args[0] == "report")
    assert duo(*args, flag, path, "--force").code == 0
    first = path.read_bytes()
    assert first != b"mine" and duo(*args, flag, path).code == 0 and path.read_bytes() == first
    path.unlink()
    os.mkfifo(path)
    assert_refused(duo(*args, flag, path, "--force"), "a pipe or a device")
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_chat_is_saved_over_a_chat_only(tmp_path):
    saved = json.dumps([{"role": "user", "content": "x"}], indent=1).encode()
    from duo_jax.cli.chat import is_chat

    assert is_chat(saved) and not is_chat(b"mine") and not is_chat(b"[1]")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_that_takes_no_files_is_named_as_such():
    # There, filelock reports a lock of another process.
    with pytest.raises(OSError, match=r"(No such file or directory|Permission denied): '/proc/x'"):  # noqa: SIM117
        with files.locked(Path("/proc/x")):
            pass
