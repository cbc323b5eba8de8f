"""The file of results: nothing finished is lost or counted twice, whatever ends a run."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from duo_eval.runner.record import Record, read
from duo_eval.tasks.recall import Job as RecallJob

ABOUT = {"task": "test", "sizes": (1, 2)}
RESULTS = Path(__file__).parent.parent / "eval" / "results"
COMMITTED = RESULTS / "cpu" / "recall.jsonl"


@dataclass(frozen=True)
class Job:
    name: str
    budget: float = 0.5


JOBS = [Job("a"), Job("b"), Job("c", 1.0)]


def fill(path, jobs, *, score=1.0, dtype="float32"):
    record = Record.open(path, ABOUT)
    with record.writing(dtype=dtype) as append:
        for job in record.missing(jobs):
            append(job, {"score": score})


def test_what_is_there_is_missing_no_more(tmp_path):
    path = tmp_path / "folder" / "out.jsonl"
    assert Record.open(path, ABOUT).missing(JOBS) == JOBS and not path.exists()
    fill(path, JOBS[:1])
    fill(path, JOBS)
    head, records = read(path)
    assert [record["job"]["name"] for record in records] == ["a", "b", "c"] and len(head["runs"]) == 2
    assert not Record.open(path, ABOUT).missing(JOBS)
    assert Record.open(path, ABOUT).missing([Job("d"), Job("d")]) == [Job("d")]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_that_a_kill_cut_off_is_done_again(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    fill(path, JOBS)
    whole = path.read_text()
    path.write_text(whole[:-cut])
    # Without its newline alone, a record is whole.
    assert Record.open(path, ABOUT).missing(JOBS) == ([] if cut == 1 else JOBS[2:])
    fill(path, JOBS)
    assert path.read_text().splitlines()[1:] == whole.splitlines()[1:]


def test_an_interrupt_keeps_what_is_finished(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), Record.open(path, ABOUT).writing(dtype="float32") as append:
        append(JOBS[0], {"score": 1.0})
        raise KeyboardInterrupt
    assert Record.open(path, ABOUT).missing(JOBS) == JOBS[1:]


def test_two_processes_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(path, JOBS[:1])
    late = Record.open(path, ABOUT)
    with Record.open(path, ABOUT).writing(dtype="float32") as append:
        with pytest.raises(ValueError, match="another process"), Record.open(path, ABOUT).writing(dtype="float32"):
            pass
        append(JOBS[1], {"score": 0.5})
    with pytest.raises(ValueError, match="changed while"), late.writing(dtype="float32"):
        pass
    assert Record.open(path, ABOUT).missing(JOBS) == JOBS[2:]


def test_a_job_that_is_there_twice_counts_once(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(path, JOBS)
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[1] + "\n")
    assert len(read(path)[1]) == len(JOBS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("years of work", "out.jsonl is not JSON"),
        ('{"mine": 1}\n', "out.jsonl is not a line of a file of results"),
        ('{"about": {}, "runs": []}\n{"score": 1}\n', "2 is not a line of a file of results"),
        ('{"about": {}, "runs": []}\n{"job\n{"job": {}}\n', "2 is not JSON"),
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path, text, said):
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        Record.open(path, ABOUT)
    assert path.read_text() == text
    with pytest.raises(ValueError, match="is a folder"):
        Record.open(tmp_path, ABOUT)


def test_a_file_of_another_run_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(path, JOBS)
    with pytest.raises(ValueError, match=r"other settings: sizes was \[1, 2\], now \[1, 3\]"):
        Record.open(path, ABOUT | {"sizes": (1, 3)})
    with Record.open(path, ABOUT, {"mine": "1234"}).writing(dtype="float32"):
        pass
    with pytest.raises(ValueError, match="other mine under the same name"):
        Record.open(path, ABOUT, {"mine": "5678"})
    assert Record.open(path, ABOUT, {"yours": "5678"}).head["gates"] == {"mine": "1234", "yours": "5678"}


def test_a_file_has_one_data_type(tmp_path):
    # Nobody asked for it: it is the device's, and no setting says it.
    path = tmp_path / "out.jsonl"
    fill(path, JOBS[:1])
    whole = path.read_text()
    with pytest.raises(ValueError, match="another data type: float32, not bfloat16; use the same settings"):
        fill(path, JOBS, dtype="bfloat16")
    assert path.read_text() == whole


def test_files_of_one_kind_are_merged(duo, tmp_path):
    one, two, both = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "both"))
    fill(one, JOBS[:2], score=0.25)
    fill(two, JOBS[1:], score=0.75)
    with Record.open(two, ABOUT, {"mine": "1234"}).writing(dtype="float32"):
        pass
    both.touch()  # As a kill leaves it.
    done = duo("eval", "merge", one, two, "--out", both)
    assert done.code == 0 and "has 3 results, 1 of them in several files" in done.out
    head, records = read(both)
    assert [(record["job"]["name"], record["score"]) for record in records] == [("a", 0.25), ("b", 0.25), ("c", 0.75)]
    # All three runs were alike.
    assert len(head["runs"]) == 1 and head["gates"] == {"mine": "1234"}
    # It is a file as any other: it goes on, into one of its own too, and what it has already changes nothing.
    assert not Record.open(both, ABOUT).missing(JOBS)
    assert duo("eval", "merge", one, both, two, "--out", one).code == 0
    assert read(one) == (head, records)
    # The other way round the other file is the first.
    assert duo("eval", "merge", two, one, "--out", two).code == 0
    assert {record["job"]["name"]: record["score"] for record in read(two)[1]} == {"a": 0.25, "b": 0.75, "c": 0.75}


def test_files_that_do_not_belong_together_are_not_merged(duo, tmp_path):
    one, two, three = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "three"))

    def begin(path, about=ABOUT, gates=None, dtype="float32"):
        path.unlink(missing_ok=True)
        with Record.open(path, about, gates).writing(dtype=dtype):
            pass

    def refused(*files, out=one):
        before = {path: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
        found = duo("eval", "merge", *files, "--out", out)
        assert found.code == 2 and before == {path: path.read_text() for path in before}
        return found.err

    fill(one, JOBS)
    begin(two, about=ABOUT | {"task": "x"})
    assert "other settings: task was 'test', now 'x'" in refused(one, two) and str(two) in refused(one, two)
    begin(two, dtype="bfloat16")
    assert "another data type: float32, not bfloat16" in refused(one, two)
    begin(two, gates={"mine": "1234"})
    begin(three, gates={"mine": "5678"})
    assert f"{two} was made with other mine under the same name in {three}" in refused(one, two, three)
    assert "name it among the files too" in refused(one, two, out=three)
    assert "is a folder" in refused(one, two, out=tmp_path)
    assert "two or more" in refused(one)
    assert "No such file" in refused(one, tmp_path / "none.jsonl")
    three.write_text("{}")
    assert refused(one, three).count("three.jsonl is not a line of a file of results")
    with Record.open(one, ABOUT).writing(dtype="float32"):
        assert "another process writes" in refused(one, two)


@pytest.mark.parametrize(
    "content",
    [
        {"about": {"tasks": ["a"]}, "command": "duo eval harness", "machine": {}, "results": {"a": {"acc,none": 1.0}}},
        {"command": "duo bench", "machine": {}, "results": [{"point": {"context": 64}, "decode_ms": 1.0}]},
        {"about": {"task": "a"}, "gates": {}, "runs": [], "results": [], "n-shot": {"a": 1}},
    ],
)
def test_files_without_jobs_are_not_merged(duo, tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    before = path.read_text()
    done = duo("eval", "merge", path, path, "--out", path)
    assert done.code == 2 and path.read_text() == before
    assert f"{path} is not a file of results by job" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("name", ["bench", "bench.json", "bench.jsonl"])
def test_measurements_are_read_back_whatever_the_name_of_their_file(tmp_path, name):
    path, points = tmp_path / name, [{"context": 1}, {"context": 2}]
    for count in (1, 2):
        record = Record.open(path, ABOUT, key="point")
        with record.writing() as append:
            for point in record.missing(points[:count]):
                append(point, {"seconds": 1.0})
    assert read(path)[1] == [{"point": point, "seconds": 1.0} for point in points]
    with Record.open(path, ABOUT, again=True).writing() as append:
        append(None, {"seconds": 2.0})
    assert read(path)[1] == [{"seconds": 2.0}]


def test_a_committed_file_has_its_jobs():
    head, records = read(COMMITTED)
    jobs = [RecallJob(**record["job"]) for record in records]
    assert len(set(jobs)) == len(jobs) > 500
    assert Record.open(COMMITTED, head["about"], head["gates"]).missing(jobs) == []
    assert len(COMMITTED.read_text().splitlines()) == 1 + len(json.loads(json.dumps(records)))


def test_an_empty_file_is_a_new_one(tmp_path):
    # As a kill leaves it, right at the start.
    path = tmp_path / "out.jsonl"
    path.touch()
    fill(path, JOBS)
    assert len(read(path)[1]) == len(JOBS)


def test_of_two_that_begin_a_new_file_one_is_refused(tmp_path):
    path = tmp_path / "new.jsonl"
    first, second = (Record.open(path, {"task": "a"}) for _ in range(2))
    with first.writing(dtype="float32") as append:
        with pytest.raises(ValueError, match="another process writes"), second.writing(dtype="float32"):
            pass
        append(Job("a"), {"score": 1.0})
    assert len(read(path)[1]) == 1 and read(path)[0]["runs"][0]["dtype"] == "float32"
    with pytest.raises(ValueError, match="changed while this run was starting"), second.writing(dtype="float32"):
        pass
    assert len(read(path)[1]) == 1


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json*")), ids=lambda path: path.name)
def test_every_committed_file_loads(path):
    head, results = read(path)
    assert results and {"about", "gates", "runs"} <= set(head)
    assert all({"command", "machine"} <= set(run) for run in head["runs"])
    if path.suffix == ".json":
        assert head["about"]["task"] in head["runs"][0]["command"].split()[1:3]


def test_measurements_are_one_object_and_resume_like_lines(tmp_path):
    path = tmp_path / "out.json"
    record = Record.open(path, ABOUT, {"code": "1234"}, key="case")
    with record.writing(device="a GPU", program="python -m suite") as append:
        append({"size": (1, 2)}, {"seconds": 1.0})
        assert json.loads(path.read_text())["results"] == [{"case": {"size": [1, 2]}, "seconds": 1.0}]
    again = Record.open(path, ABOUT, {"code": "1234"}, key="case")
    assert again.missing([{"size": (1, 2)}, {"size": (3, 4)}]) == [{"size": (3, 4)}]
    assert (again.head["runs"][0]["device"], again.results) == ("a GPU", record.results)
    assert again.head["runs"][0]["command"].startswith("python -m suite")
    with pytest.raises(ValueError, match="other code under the same name"):
        Record.open(path, ABOUT, {"code": "5678"})
    again.results.clear()  # Such as those that failed.
    with again.writing(), pytest.raises(ValueError, match="another process"), record.writing():
        pass
    assert read(path)[1] == [] and len(read(path)[0]["runs"]) == 2


def test_what_is_measured_again_replaces_results_of_its_own_command(tmp_path):
    path = tmp_path / "out.json"
    with Record.open(path, {"task": "kernels", "sizes": [1]}).writing() as append:
        append(None, {"seconds": 1.0})
    with Record.open(path, {"task": "kernels", "sizes": [2]}, again=True).writing() as append:
        append(None, {"seconds": 2.0})
    head, results = read(path)
    assert head["about"]["sizes"] == [2] and len(head["runs"]) == 1 and results == [{"seconds": 2.0}]
    with pytest.raises(ValueError, match="a result of kernels, not of memory"):
        Record.open(path, {"task": "memory"}, again=True)


def test_without_a_path_results_are_not_kept():
    record = Record.open(None, ABOUT)
    with record.writing() as append:
        append(JOBS[0], {"seconds": 1.0})
    assert record.results == [{"job": {"name": "a", "budget": 0.5}, "seconds": 1.0}]
