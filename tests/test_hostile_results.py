"""A results tree that a stranger sent, or that somebody edited: named and left as it is, and
nothing is written outside of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_study as fake
import pytest
from hostile import everything, peak
from PIL import Image
from studies import TWO_MODES, replaced, write

from analysis import load, probes, report
from study.errors import StudyError
from study.forecast import BENCH
from study.resolve import load as resolved
from study.run import main
from study.sample import main as sample
from study.store import Folder, Store, append_line, write_json

SMALL = replaced("seeds: [0, 1]", "seeds: [0]").replace("images: 1280", "images: 128").replace(
    "at: [0.5, 1.0]", "at: [1.0]").replace("samples: 256", "samples: 32")  # fmt: skip
GONE = object()
FEW = {k: fake.VARIANTS[k] for k in ("ct", "cd", "self_pretrain")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study: small.yaml and results/."""
    folder = tmp_path_factory.mktemp("done")
    path = write(folder, SMALL)
    assert main([str(path), "--results", str(folder / "results"), "--workers", "0"]) == 0
    return folder


@pytest.fixture
def home(done: Path, tmp_path: Path) -> Path:
    """A copy of it, and something outside of its results."""
    shutil.copytree(done, tmp_path / "home")
    (tmp_path / "home" / "outside").mkdir()
    (tmp_path / "home" / "outside" / "file").write_text("as it was")
    return tmp_path / "home"


def command(home: Path, *words: str) -> int:
    """The study's command."""
    results = str(home / "results")
    return main([str(home / "small.yaml"), "--results", results, "--workers", "0", *words])


def folder_of(home: Path, name: str = "ct") -> Folder:
    """The folder of a run by the name of its recipe."""
    (path,) = (home / "results" / "small" / "runs").glob(f"{name}-*")
    return Folder(path)


def linked(path: Path, to: Path) -> None:
    """The path becomes a link."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


RUN = "results/small/runs/ct"
LINKS = ["results/small", "results/small/runs", RUN, f"{RUN}/snapshots", f"{RUN}/measures",
         f"{RUN}/attempts.jsonl", f"{RUN}/log.txt", f"{RUN}/lock", f"{RUN}/steps.jsonl",
         f"{RUN}/run.json", f"{RUN}/state.pt", f"{RUN}/snapshots/1.000.pt"]  # fmt: skip


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("where", LINKS)
def test_nothing_is_written_through_a_link(
    where: str, relative: bool, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / where.replace(RUN, str(folder_of(home).path.relative_to(home)))
    folder_of(home).file("trained.json").unlink()  # there is work to do
    to = home / "outside" if path.is_dir() else home / "outside" / "file"
    linked(path, Path(os.path.relpath(to, path.parent)) if relative else to)
    for words in ((), ("--status",), ("--plan",), ("--retry",)):
        before = everything(home)
        assert command(home, *words) == 2
        told = capsys.readouterr().err
        assert f"{path}: a link that leads out of {home / 'results'}" in told, told
        assert everything(home) == before


def test_a_link_may_stay_inside(home: Path) -> None:
    """A source may lie in another study's folder, as long as that is in the same results."""
    teacher = folder_of(home, "edm").path
    other = home / "results" / "other" / teacher.name
    other.parent.mkdir()
    teacher.rename(other)
    teacher.symlink_to(Path("../../other", teacher.name))
    assert command(home) == 0


def test_two_folders_of_one_run_are_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder_of(home).path
    shutil.copytree(path, path.with_name(path.name.replace("ct-", "another-")))
    assert command(home) == 2
    told = capsys.readouterr().err
    assert path.name in told and "another-" in told and "of the same run" in told


def pipe(path: Path) -> None:
    """A pipe that nobody writes to."""
    os.mkfifo(path)


def put(text: str | bytes) -> Callable[[Path], None]:
    """A file of this content."""
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def changed(**keys: object) -> Callable[[Path], None]:
    """A JSON file with other values, or without some."""

    def change(path: Path) -> None:
        value = json.loads(path.read_bytes()) | keys
        path.write_text(json.dumps({k: v for k, v in value.items() if v is not GONE}))

    return change


def sparse(path: Path) -> None:
    """A file of 8 GB that takes no room."""
    path.touch()
    os.truncate(path, 1 << 33)


EDITS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a folder for a file": ("trained.json", Path.mkdir, "a plain file belongs there"),
    "a file for a folder": ("measures", put(""), "a folder belongs there"),
    "a folder for the lock": ("lock", Path.mkdir, "a plain file belongs there"),
    "a pipe": ("trained.json", pipe, "a plain file belongs there"),
    "a log that is a pipe": ("attempts.jsonl", pipe, "a plain file belongs there"),
    "deep JSON": ("trained.json", put("[" * 10**6), "trained.json: cannot be read: maximum rec"),
    "a huge file": ("trained.json", sparse, "trained.json: cannot be read: over 16777216 bytes"),
    "a huge log": ("attempts.jsonl", sparse, "attempts.jsonl: cannot be read: over 1677"),
    "a list": ("trained.json", put("[]"), "Expected `object`"),
    "not a number": ("trained.json", put('{"outcome": NaN}'), "malformed"),
    "digits without end": ("trained.json", put(f'{{"id": 1{"0" * 9999}}}'), "out of range"),
    "no UTF-8": ("trained.json", put(b'"\xff"'), "trained.json: cannot be read: 'utf-8'"),
    "another outcome": ("trained.json", changed(outcome="fine"), "`$.outcome`"),
    "no snapshots": ("trained.json", changed(snapshots=GONE), "missing required field `snap"),
    "text for a share": ("trained.json", changed(snapshots=[{"at": "1", "images": 1}]), "`$.snap"),
    "text for the spend": ("trained.json", changed(spend="much"), "`$.spend`"),
    "no digests": ("trained.json", changed(sha256=[]), "`$.sha256`"),
    "another run's": ("trained.json", changed(id="0123456789"), "belongs to run '0123456789'"),
    "a row of another type": ("attempts.jsonl", put("[1]\n"), "attempts.jsonl: line 1: Expected"),
    "a row of no event": ("attempts.jsonl", put('{"event": "begin"}\n'), "`$.event`; remove"),
    "a reason of another type": (
        "attempts.jsonl", put('{"event": "end", "reason": [1]}\n'), "`$.reason`; remove"),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_run_folder_is_named_and_left_alone(
    case: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, edit, told = EDITS[case]
    folder = folder_of(home)
    if name == "attempts.jsonl":  # it is read of runs that are not done
        folder.file("trained.json").unlink()
    path = folder.file(name)
    if edit in (Path.mkdir, pipe, sparse):
        path.unlink()
    if path.is_dir():
        shutil.rmtree(path)
    edit(path)
    before, listed = peak(), sorted(p.name for p in folder.path.iterdir())
    for words in ((), ("--status",)):
        assert command(home, *words) == 2
        error = capsys.readouterr().err
        assert str(path) in error and "Traceback" not in error
        assert told in error, error
    assert sorted(p.name for p in folder.path.iterdir()) == listed
    assert peak() - before < 200_000  # KiB


def test_an_edited_log_of_steps_stops_the_run_by_name(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(home)
    folder.file("trained.json").unlink()
    append_line(folder.file("steps.jsonl"), {"images": "many", "loss": [1]})
    assert folder.progress() is None  # only shown
    assert command(home) == 1
    assert "steps.jsonl: line" in capsys.readouterr().out
    assert "steps.jsonl: line" in folder.reason()


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"id": "0123456789", "settings": {}}',
                                     b"[" * 100_000, b'{"id": NaN}'])  # fmt: skip
def test_a_measurement_that_is_not_this_runs_is_made_again(content: bytes, home: Path) -> None:
    path = sorted(folder_of(home).file("measures").iterdir())[0]
    whole = json.loads(path.read_bytes())
    path.write_bytes(content)
    assert command(home) == 0
    again = json.loads(path.read_bytes())
    assert again | {"seconds": 0} == whole | {"seconds": 0}


def test_a_reason_commands_neither_terminal_nor_markup(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "\x1b]0;mine\x07 [/red] [bold"
    folder_of(home).file("trained.json").unlink()
    append_line(folder_of(home).file("attempts.jsonl"), {"event": "end", "reason": reason})
    changed(outcome="diverged", reason=reason)(folder_of(home, "cd").file("trained.json"))
    stray = home / "results" / "small" / "runs" / "x[red]-[bold]"
    stray.mkdir()
    for words, there in ((("--status",), 2), (("--plan",), 0)):
        assert command(home, *words) in (0, 1)
        told = capsys.readouterr().out
        assert "\x1b" not in told and "\x07" not in told
        assert told.count("\\x1b]0;mine\\x07 [/red] [bold") == there
    assert stray.name in told


@pytest.mark.parametrize("bench", [
    "[]", '{"recipes": 1}', '{"device": "x", "recipes": {"a": 1}}', "{",
    '{"device": "x", "recipes": {"small/ct": {}}}',
])  # fmt: skip
def test_edited_figures_of_speed_are_named(
    bench: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(home).file("trained.json").unlink()
    (home / "results" / "small" / BENCH["cpu"]).write_text(bench)
    assert command(home, "--plan", "--device", "cpu") == 2
    assert f"{BENCH['cpu']}: cannot be read" in capsys.readouterr().err


SAMPLED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no object": ("run.json", put("[]"), "run.json: cannot be read: Expected `object`"),
    "no factors": ("run.json", changed(factors=GONE), "missing required field `factors`"),
    "factors of another kind": ("run.json", changed(factors={"data": 1}), "of another version"),
    "an objective of another kind": (
        "run.json", changed(factors={"objective": {"kind": []}}), "of another version"),
    "no noise levels": ("trained.json", changed(sigma_data=-1.0), "sigma.data: -1.0 given"),
    "a deviation that is gone": ("trained.json", changed(sigma_data=GONE), "data None given"),
    "a torn one": ("trained.json", put("{"), "trained.json: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLED)
def test_samples_of_an_edited_run_are_refused(
    case: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, edit, told = SAMPLED[case]
    edit(folder_of(home).file(name))
    assert sample([str(folder_of(home).path), "--out", str(home / "x.npy")]) == 2
    assert told in capsys.readouterr().err and not (home / "x.npy").exists()


def test_samples_of_endless_data_that_would_fill_the_memory(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder_of(home).file("run.json")
    known = json.loads(path.read_bytes())
    known["factors"]["data"]["samples"] = 10**13
    path.write_text(json.dumps(known))
    assert sample([str(folder_of(home).path), "--out", str(home / "x.npy")]) == 2
    assert "run.json: data.samples: 10000000000000 of 1 numbers" in capsys.readouterr().err


# --- clocks ---


def test_clocks_that_disagree_change_nothing(home: Path, tmp_path: Path) -> None:
    """Order is that of lines and steps; nothing asks a file or a row what time it was."""
    path, results = home / "small.yaml", home / "results"
    store = Store(results, resolved(path))
    folder_of(home).file("trained.json").unlink()
    folder_of(home, "cd").file("trained.json").unlink()
    failed, stopped = folder_of(home), folder_of(home, "cd")
    append_line(failed.file("attempts.jsonl"), {
        "event": "end", "time": "1970-01-01T00:00:00Z", "reason": "disk full"})  # fmt: skip
    append_line(stopped.file("attempts.jsonl"), {
        "event": "start", "time": "2999-01-01T00:00:00Z"})  # fmt: skip
    append_line(stopped.file("attempts.jsonl"), {
        "event": "end", "time": "not a time", "reason": "stopped"})  # fmt: skip
    before = store.states(thorough=True)
    assert sorted(before.values()) == ["done", "failed", "interrupted"]
    for number, file in enumerate(sorted(results.rglob("*"))):
        os.utime(file, (4e9, 4e9) if number % 2 else (0, 0))
    assert store.states(thorough=True) == before
    assert command(home, "--retry") == 0


def test_clocks_that_disagree_change_no_report(tmp_path: Path) -> None:
    tree = fake.write(tmp_path / "s", variants=FEW)
    told = {}
    for when in ("first", "then"):
        out = report.build(tree).parent
        told[when] = {k: v for k, v in everything(out).items() if not k.endswith(".png")}
        for number, file in enumerate(sorted(tree.rglob("*"))):
            os.utime(file, (4e9, 4e9) if number % 2 else (0, 0))
        attempts = fake.folder_of(tree, "ct", 0) / "attempts.jsonl"
        rows = [json.loads(line) for line in attempts.read_text().splitlines()]
        attempts.write_text("".join(
            json.dumps(r | {"time": f"{2999 - i}-01-01"}) + "\n" for i, r in enumerate(rows)))
    assert told["first"] == told["then"]


# --- the report ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study to report on."""
    return fake.write(tmp_path_factory.mktemp("made") / "s", variants=FEW, seeds=(0, 1))


@pytest.fixture
def tree(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, and something outside of it; nothing there may change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("as it was")
    yield Path(shutil.copytree(made, tmp_path / "s"))
    assert everything(tmp_path / "outside") == {"file": b"as it was"}
    assert sorted(os.listdir(tmp_path)) == ["outside", "s"]


def edit(path: Path, *keys: str | int, to: object) -> None:
    """Sets one value of a JSON file."""
    whole: Any = json.loads(path.read_bytes())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/b", "..", "", "a\n", "x" * 300, "a\0"])
@pytest.mark.parametrize("keys", [("cells", 0), ("recipes", 2, "cell"), ("recipes", 2, "name"),
                                  ("runs", 0, "folder"), ("runs", 0, "id")])  # fmt: skip
def test_a_plan_names_nothing_outside(keys: tuple, name: str, tree: Path) -> None:
    edit(tree / "study.json", *keys, to=name)
    with pytest.raises(StudyError, match="study.json: .*regex"):
        report.build(tree)
    assert not (tree / "report").exists()


@pytest.mark.parametrize("where", ["report", "report/runs.csv", "report/effects-digits.png",
                                   "report/report.html"])  # fmt: skip
def test_a_report_is_not_written_through_a_link(where: str, tree: Path) -> None:
    outside = tree.parent / "outside"
    linked(tree / where, outside if where == "report" else outside / "file")
    with pytest.raises(StudyError, match=f"{where}: a link that leads out of"):
        report.build(tree)


def test_a_study_that_is_a_link_is_not_one_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = fake.write(tmp_path / "elsewhere", variants=FEW, seeds=(0,))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "s").symlink_to(elsewhere)
    monkeypatch.chdir(tmp_path)
    assert report.main(["s"]) == 2
    assert "results/s: a link that leads out of results" in capsys.readouterr().err
    assert not (elsewhere / "report").exists()


def bomb(path: Path) -> None:
    """A picture of 100 MB in 100 kB."""
    Image.new("L", (10_000, 10_000)).save(path)


BROKEN: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a bomb of a picture": ("samples.png", bomb),
    "a torn picture": ("samples.png", put(b"\x89PNG\r\n\x1a\n")),
    "no picture": ("samples.png", put("GIF89a")),
    "a picture that is a pipe": ("samples.png", pipe),
    "deep JSON": ("trained.json", put("[" * 10**6)),
    "a huge file": ("trained.json", sparse),
    "a pipe": ("run.json", pipe),
    "a folder": ("run.json", Path.mkdir),
    "a log of another type": ("attempts.jsonl", put("[1]\n")),
    "a huge log": ("attempts.jsonl", sparse),
    "another run's": ("trained.json", put('{"id": "0123456789"}')),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_in_the_report(case: str, tree: Path) -> None:
    name, breaks = BROKEN[case]
    path = fake.folder_of(tree, "ct", 0) / name
    path.unlink(missing_ok=True)
    before = peak()
    breaks(path)
    study = load.load(tree)
    (problem,) = study.problems
    assert problem.startswith(f"runs/{path.parent.name}/{name}: ")
    told = str(report._provenance(study)[-2:])
    assert "1 file could not be read" in told and name in told
    report.tables.comparisons(study)
    if name == "samples.png":
        assert load.load(tree).problems == (problem,)  # the same bytes again: no address in it
        assert len(probes.sample_files(study.of("digits"))) == 3  # of the other seed
    assert peak() - before < 300_000  # KiB


@pytest.mark.parametrize("value", [10**400 // 10**100, -1e308, 1e308, 1e-320, True, None, "1",
                                   [1.0], {}])  # fmt: skip
@pytest.mark.parametrize("keys", [("value",), ("draws",), ("floor",), ("images",), ("at",)])
def test_values_that_no_measurement_gives_are_not_measured(
    keys: tuple, value: object, tree: Path
) -> None:
    for file in (fake.folder_of(tree, "ct", 0) / "measures").glob("1.000-*"):
        edit(file, *keys, to=[value] * 3 if keys == ("draws",) else value)
    study = load.load(tree)
    assert not study.problems
    assert all(abs(x) <= 1e100 for x in study.measures["value"].dropna())
    report.tables.comparisons(study)


def test_a_bomb_among_the_pictures_leaves_the_report_whole(tree: Path) -> None:
    for run in (tree / "runs").iterdir():
        if run.name.startswith("ct-"):
            bomb(run / "samples.png")
    before = peak()
    text = report.build(tree).with_suffix(".md").read_text()
    assert text.count("10000 x 10000 pixels; allowed: 4096") == 2
    assert peak() - before < 400_000  # KiB


def test_a_study_json_beyond_reading_is_one_error(tree: Path) -> None:
    for text in ("[" * 10**6, '{"schema": 1', "[]", '{"schema": 1, "name": NaN}'):
        (tree / "study.json").write_text(text)
        with pytest.raises(StudyError, match="study.json"):
            report.build(tree)
    os.truncate(tree / "study.json", 1 << 33)
    with pytest.raises(StudyError, match="study.json: cannot be read: over"):
        report.build(tree)


def test_records_may_be_written_beside(done: Path, tmp_path: Path) -> None:
    """Only what a run's own files are called is looked at: notes of a user's own are no harm."""
    shutil.copytree(done, tmp_path / "home")
    folder = folder_of(tmp_path / "home")
    folder.file("notes.txt").write_text("mine")
    folder.file("more").mkdir()
    write_json(folder.file("more/a.json"), [])
    assert command(tmp_path / "home") == 0
    assert TWO_MODES
