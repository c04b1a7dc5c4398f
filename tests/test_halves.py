"""One run that two machines worked on: its folders come together whole, and where the halves of
two trainings lie in one folder, every command and the report name it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from studies import content, write
from test_promises import FULL, half_trained, run

from analysis import load, report
from study import worker
from study.halves import begun, foreign, mixed
from study.run import main
from study.store import append_line, read_json, read_lines, sha256, write_json

ROOT = Path(__file__).parents[1]
CT = "ct-small-s0"


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a/results, where CT of seed 0 was stopped in its middle, and b/results, where it is done."""
    folder = tmp_path_factory.mktemp("machines")
    for name in "ab":
        (folder / name).mkdir()
    *_, half = half_trained(folder / "a", "ct")
    start = worker.provenance(torch.device("cpu")) | {"host": "a"}
    append_line(half.file("attempts.jsonl"), start)
    append_line(half.file("attempts.jsonl"), {"event": "end", "reason": "stopped"})
    path = write(folder / "b", FULL)
    assert run(path, folder / "a" / "results", "--status") == 3
    assert run(path, folder / "b" / "results", "--only", "*-s0") == 0
    return folder


@pytest.fixture
def copies(machines: Path, tmp_path: Path) -> Path:
    """A copy of both."""
    shutil.copytree(machines, tmp_path / "copies")
    return tmp_path / "copies"


def folder_of(machine: Path) -> Path:
    """The folder of CT of seed 0."""
    (path,) = (machine / "results" / "small" / "runs").glob(f"{CT}-*")
    return path


def file_by_file(there: Path, here: Path) -> None:
    """What `rsync --ignore-existing` and `cp -rn` do."""
    for path in sorted(p for p in there.rglob("*") if p.is_file()):
        to = here / path.relative_to(there)
        if not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to)


def refused(copies: Path, capsys: pytest.CaptureFixture[str], why: str) -> None:
    """Every command names the folder, what is the matter and what helps; so does the report."""
    path, results = copies / "b" / "small.yaml", copies / "a" / "results"
    capsys.readouterr()
    for words in ("--status",), ("--plan",), (), ("--on", "slurm", "--device", "cpu"):
        assert run_words(path, results, words) == 2
        told = capsys.readouterr().err
        assert f"{folder_of(copies / 'a')}: two halves of one run: {why}" in told, told
        assert "remove such a folder" in told and "copy it whole" in told
    shutil.copy(copies / "b" / "results" / "small" / "study.json", results / "small")
    report.build(results / "small")
    text = (results / "small" / "report" / "report.md").read_text()
    assert "No mismatch" not in text
    found = re.findall(r".*two halves of one run.*", text)
    assert found and all(folder_of(copies / "a").name in x and why in x for x in found), text


def run_words(path: Path, results: Path, words: tuple[str, ...]) -> int:
    """The command; on a cluster there are no workers."""
    return main([str(path), "--results", str(results), *words,
                 *(() if "--on" in words else ("--workers", "0"))])  # fmt: skip


def test_halves_of_one_run_are_named(
    copies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = folder_of(copies / "a"), folder_of(copies / "b")
    file_by_file(there, here)
    assert (here / "trained.json").read_bytes() == (there / "trained.json").read_bytes()
    assert len(read_lines(here / "steps.jsonl")) < len(read_lines(there / "steps.jsonl"))
    refused(copies, capsys, "steps.jsonl is not the log")
    # as it says: removed it is made again, with the bits of the other machine's
    shutil.rmtree(here)
    assert run(copies / "b" / "small.yaml", copies / "a" / "results", "--only", f"{CT}*") == 0
    made, other = (content(copies / m / "results") for m in "ab")
    shared = {name: value for name, value in made.items() if name.startswith(CT)}
    assert shared == {n: v for n, v in other.items() if n.startswith(CT)} and shared


def test_attempts_of_another_training_are_named(
    copies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = folder_of(copies / "a"), folder_of(copies / "b")
    (here / "steps.jsonl").unlink()  # the other machine failed before its first step
    file_by_file(there, here)
    refused(copies, capsys, "attempts.jsonl lacks the attempt")


def test_several_folders_are_named_at_once(
    copies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copies / "b" / "results" / "small" / "runs"
    for folder in runs.glob("ct-*"), runs.glob("cd-*"):
        append_line(next(folder) / "steps.jsonl", {"images": 1, "loss": 1.0})
    assert run(copies / "b" / "small.yaml", copies / "b" / "results", "--status") == 2
    assert capsys.readouterr().err.count("two halves of one run") == 2


def test_a_run_that_was_stopped_and_resumed_is_whole(copies: Path) -> None:
    """Also where the last attempts only measured, or were killed: any may have trained it."""
    results = copies / "a" / "results"
    assert run(copies / "b" / "small.yaml", results, "--only", f"{CT}*") == 0
    here = folder_of(copies / "a")
    rows = read_lines(here / "attempts.jsonl")
    assert [r.get("reason") for r in rows if r["event"] == "end"] == ["stopped", "done"]
    append_line(here / "attempts.jsonl", worker.provenance(torch.device("cpu")) | {"pid": 1})
    next((here / "measures").iterdir()).unlink()
    assert run(copies / "b" / "small.yaml", results, "--only", f"{CT}*") == 0
    assert len(begun((here / "attempts.jsonl").read_bytes())) == 4


def test_measurements_of_another_training_are_named_and_made_again(copies: Path) -> None:
    """Both machines finished the run, on devices that round differently, and measured different
    things: a copy file by file leaves the other's numbers beside this one's weights."""
    path, results = copies / "b" / "small.yaml", copies / "b" / "results"
    folder = folder_of(copies / "b")
    first, *others = sorted((folder / "measures").iterdir())
    whole = read_json(first)
    (name,) = [n for n in read_json(folder / "trained.json")["sha256"] if first.name[:5] in n]
    assert whole["snapshot"] == sha256(folder / name)
    write_json(first, whole | {"value": 1e3, "snapshot": "0" * 64})
    study = load.load(results / "small")
    told = f"runs/{folder.name}/measures/{first.name}: of other weights than the run's; not used"
    assert study.problems == (told,)
    assert 1e3 not in study.measures["value"].tolist() and others
    assert run(path, results, "--only", "*-s0") == 0
    assert read_json(first) | {"seconds": 0} == whole | {"seconds": 0}


@pytest.mark.parametrize(("left", "why"), [
    (None, "not there; its measurements are not used"), ("{", "cannot be read: ")])  # fmt: skip
def test_measurements_that_no_trained_json_vouches_for_are_not_told_as_foreign(
    copies: Path, left: str | None, why: str
) -> None:
    folder = folder_of(copies / "b")
    files = sorted(p.name for p in (folder / "measures").iterdir())
    (folder / "trained.json").unlink() if left is None else (
        folder / "trained.json").write_text(left)
    study = load.load(folder.parents[1])
    (told,) = study.problems
    assert told.startswith(f"runs/{folder.name}/trained.json: {why}")
    here = study.missing.set_index("id").loc[[folder.name.rpartition("-")[2]]]
    assert set(here[here.file.isin(files)].why) == {load.UNTOLD} and files
    assert folder.name.rpartition("-")[2] not in study.measures["id"].tolist()
    assert not foreign({}, files[0], {"snapshot": "0" * 64})


def test_runs_of_before_are_whole_as_far_as_can_be_told() -> None:
    assert mixed({}, None, None) is mixed({"sha256": {}, "attempt": None}, None, b"x") is None
    assert mixed({"sha256": {"steps.jsonl": "0" * 64}}, None, None) is None  # no log was kept
    assert "steps.jsonl" in str(mixed({"sha256": {"steps.jsonl": "0" * 64}}, None, b""))


def test_the_readmes_command_copies_whole_folders(copies: Path) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("no rsync here")
    here, there = (copies / m / "results" / "small" / "runs" for m in "ab")
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    (command,) = re.findall(r"^`(ls .*rsync .*)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    command = command.replace("other:consistency-gap/results/grid/runs", str(there))
    command = command.replace("results/grid/runs", str(here))
    assert "grid" not in command and "other" not in command
    subprocess.run(command, shell=True, check=True)
    assert {p: p.read_bytes() for p in before} == before  # what was here stays as it is
    assert {p.name for p in here.iterdir()} == {p.name for p in there.iterdir()} | {
        p.parents[0].name for p in before if p.parents[1] == here}  # fmt: skip
    inside = folder_of(copies / "a")
    assert not (inside / "trained.json").exists()  # nothing came into a folder that was here
    for path in there.iterdir():
        if path.name != inside.name and not any(p.is_relative_to(here / path.name)
                                                for p in before):  # fmt: skip
            files = [p.relative_to(path) for p in path.rglob("*") if p.is_file()]
            assert all((here / path.name / f).read_bytes() == (path / f).read_bytes()
                       for f in files)  # fmt: skip
    assert run(copies / "b" / "small.yaml", copies / "a" / "results") == 0  # and goes on from it
