"""The file of results: nothing finished is lost or counted twice, whatever ends a run."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from eval.ledger import Ledger, read
from eval.recall import Job as RecallJob

ABOUT = {"task": "test", "sizes": (1, 2)}
COMMITTED = Path(__file__).parent.parent / "eval" / "results" / "cpu" / "recall.jsonl"


@dataclass(frozen=True)
class Job:
    name: str
    budget: float = 0.5


JOBS = [Job("a"), Job("b"), Job("c", 1.0)]


def fill(path, jobs):
    ledger = Ledger.open(path, ABOUT)
    with ledger.writing(dtype="float32") as append:
        for job in ledger.missing(jobs):
            append(job, {"score": 1.0})


def test_what_is_there_is_missing_no_more(tmp_path):
    path = tmp_path / "folder" / "out.jsonl"
    assert Ledger.open(path, ABOUT).missing(JOBS) == JOBS and not path.exists()
    fill(path, JOBS[:1])
    fill(path, JOBS)
    head, records = read(path)
    assert [record["job"]["name"] for record in records] == ["a", "b", "c"] and len(head["runs"]) == 2
    assert not Ledger.open(path, ABOUT).missing(JOBS)
    assert Ledger.open(path, ABOUT).missing([Job("d"), Job("d")]) == [Job("d")]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_that_a_kill_cut_off_is_done_again(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    fill(path, JOBS)
    whole = path.read_text()
    path.write_text(whole[:-cut])
    # Without its newline alone, a record is whole.
    assert Ledger.open(path, ABOUT).missing(JOBS) == ([] if cut == 1 else JOBS[2:])
    fill(path, JOBS)
    assert path.read_text().splitlines()[1:] == whole.splitlines()[1:]


def test_an_interrupt_keeps_what_is_finished(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), Ledger.open(path, ABOUT).writing(dtype="float32") as append:
        append(JOBS[0], {"score": 1.0})
        raise KeyboardInterrupt
    assert Ledger.open(path, ABOUT).missing(JOBS) == JOBS[1:]


def test_two_processes_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(path, JOBS[:1])
    late = Ledger.open(path, ABOUT)
    with Ledger.open(path, ABOUT).writing(dtype="float32") as append:
        with pytest.raises(ValueError, match="another process"), Ledger.open(path, ABOUT).writing(dtype="float32"):
            pass
        append(JOBS[1], {"score": 0.5})
    with pytest.raises(ValueError, match="in the meantime"), late.writing(dtype="float32"):
        pass
    assert Ledger.open(path, ABOUT).missing(JOBS) == JOBS[2:]


def test_a_job_that_is_there_twice_counts_once(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(path, JOBS)
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[1] + "\n")
    assert len(read(path)[1]) == len(JOBS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("years of work", "1 is not JSON"),
        ('{"mine": 1}\n', "1 is not a result"),
        ('{"about": {}, "runs": []}\n{"score": 1}\n', "2 is not a result"),
        ('{"about": {}, "runs": []}\n{"job\n{"job": {}}\n', "2 is not JSON"),
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path, text, said):
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        Ledger.open(path, ABOUT)
    assert path.read_text() == text
    with pytest.raises(ValueError, match="is a folder"):
        Ledger.open(tmp_path, ABOUT)


def test_a_file_of_another_run_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(path, JOBS)
    with pytest.raises(ValueError, match=r"other settings: sizes was \[1, 2\], now \[1, 3\]"):
        Ledger.open(path, ABOUT | {"sizes": (1, 3)})
    with Ledger.open(path, ABOUT, {"mine": "1234"}).writing(dtype="float32"):
        pass
    with pytest.raises(ValueError, match="other gates or data under the name of mine"):
        Ledger.open(path, ABOUT, {"mine": "5678"})
    assert Ledger.open(path, ABOUT, {"yours": "5678"}).head["gates"] == {"mine": "1234", "yours": "5678"}


def test_files_of_one_kind_are_merged(duo, tmp_path):
    one, two, both = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "both"))
    fill(one, JOBS[:2])
    fill(two, JOBS[1:])
    with Ledger.open(two, ABOUT, {"mine": "1234"}).writing(dtype="float32"):
        pass
    done = duo("eval", "merge", one, two, "--out", both)
    assert done.code == 0 and "has 3 results" in done.out
    head, records = read(both)
    assert [record["job"]["name"] for record in records] == ["a", "b", "c"]
    # All three runs were alike.
    assert len(head["runs"]) == 1 and head["gates"] == {"mine": "1234"}
    # It is a file as any other: it goes on, into one of its own too, and what it has already changes nothing.
    assert not Ledger.open(both, ABOUT).missing(JOBS)
    assert duo("eval", "merge", one, both, two, "--out", one).code == 0
    assert read(one) == (head, records)


def test_files_that_do_not_belong_together_are_not_merged(duo, tmp_path):
    one, two, late = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "late"))
    fill(one, JOBS)
    with Ledger.open(one, ABOUT, {"mine": "1234"}).writing(dtype="float32"):
        whole = one.read_text()
    merged = lambda *files, out=one: duo("eval", "merge", *files, "--out", out)  # noqa: E731
    for about, gates, said in (({"task": "x"}, {}, "other settings"), (ABOUT, {"mine": "5678"}, "the name of mine")):
        two.unlink(missing_ok=True)
        with Ledger.open(two, about, gates).writing(dtype="float32"):
            pass
        refused = merged(one, two)
        assert refused.code == 2 and said in refused.err and str(two) in refused.err
        assert one.read_text() == whole
    fill(late, JOBS)
    assert "name it among the files too" in merged(one, late, out=two).err
    assert "two or more" in merged(one).err
    assert "No such file" in merged(one, tmp_path / "none.jsonl").err
    with Ledger.open(one, ABOUT).writing(dtype="float32"):
        whole = one.read_text()
        assert "another process writes" in merged(one, late).err
    assert one.read_text() == whole


def test_the_committed_recall_is_a_ledger():
    head, records = read(COMMITTED)
    jobs = [RecallJob(**record["job"]) for record in records]
    assert len(set(jobs)) == len(jobs) > 500
    assert Ledger.open(COMMITTED, head["about"], head["gates"]).missing(jobs) == []
    assert len(COMMITTED.read_text().splitlines()) == 1 + len(json.loads(json.dumps(records)))


def test_an_empty_file_is_a_new_one(tmp_path):
    # As a kill leaves it, right at the start.
    path = tmp_path / "out.jsonl"
    path.touch()
    fill(path, JOBS)
    assert len(read(path)[1]) == len(JOBS)


def test_of_two_that_begin_a_new_file_one_is_refused(tmp_path):
    path = tmp_path / "new.jsonl"
    first, second = (Ledger.open(path, {"task": "a"}) for _ in range(2))
    with first.writing(dtype="float32") as append:
        with pytest.raises(ValueError, match="another process writes"), second.writing(dtype="float32"):
            pass
        append(Job("a"), {"score": 1.0})
    assert len(read(path)[1]) == 1 and read(path)[0]["runs"][0]["dtype"] == "float32"
    with pytest.raises(ValueError, match="written to in the meantime"), second.writing(dtype="float32"):
        pass
    assert len(read(path)[1]) == 1
