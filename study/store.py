"""The run folder: the only record of a run, and the state that is derived from it.

Every file is written whole, through a temporary file in the same folder, fsync and os.replace;
logs are appended line by line. A run's state is never stored: running = its lock is held (the
kernel frees it at death), done = trained.json and every measurement asked for at a point it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import msgspec
from filelock import FileLock, Timeout

from study.bounded import check_entries, content, decoded, inside
from study.errors import StudyError
from study.halves import foreign
from study.spec import Run, Study

ENDED_WELL = ("done", "stopped")
LEFT = ("pending", "interrupted", "to measure")  # states of what waits to be taken up
FILES = ("attempts.jsonl", "lock", "log.txt", "run.json", "samples.png", "state.pt", "steps.jsonl",
         "trained.json")  # fmt: skip
FOLDERS = ("measures", "snapshots")
REMOVE = "; remove it to have it made again"


class Snapshot(TypedDict):
    """A snapshot in trained.json; file: null where there are no weights."""

    at: float
    images: int
    file: NotRequired[str | None]


class Cost(TypedDict):
    """What is read of a spend."""

    images: int
    seconds: float


class Trained(TypedDict):
    """trained.json, whose other keys are free."""

    id: str
    outcome: Literal["trained", "diverged"]
    reason: str | None
    spend: Cost
    snapshots: list[Snapshot]
    sha256: dict[str, str]
    data_digest: str
    inputs: dict[str, str]
    attempt: NotRequired[str | None]
    sigma_data: NotRequired[float]
    shape: NotRequired[list[int]]


class Measured(TypedDict):
    """A measurement; its values are free."""

    id: str
    settings: dict[str, Any]
    snapshot: NotRequired[str | None]  # SHA-256 of the weights measured


class Attempt(TypedDict):
    """A row of attempts.jsonl: an end has its reason, a start its device, both a Slurm job."""

    event: Literal["start", "end"]
    reason: NotRequired[str]
    device: NotRequired[str]
    job: NotRequired[str]


class Step(TypedDict):
    """What is read of a row of steps.jsonl."""

    images: int
    loss: float


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Writes plain data as JSON, whole or not at all. NaN and infinity are refused."""
    write_bytes(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def read_json(path: Path, shape: Any = Any) -> Any | None:  # noqa: ANN401
    """The file's value, or None where there is no such file. Raises StudyError on a torn one, and
    on a value of another shape."""
    data = content(path)
    try:
        return None if data is None else decoded(data, shape, str(path))
    except StudyError as error:
        raise StudyError(f"{error}{REMOVE}") from None


def read_lines(path: Path, shape: Any = dict) -> list[dict]:  # noqa: ANN401
    """The rows of a line log; a line that a crash cut short is left out. Raises StudyError on one
    that is whole and of another shape."""
    rows = []
    for number, line in enumerate((content(path) or b"").splitlines(), start=1):
        try:
            rows.append(msgspec.json.decode(line))
        except (ValueError, RecursionError):  # torn: what it would have said is lost
            continue
        try:
            msgspec.convert(rows[-1], shape)
        except msgspec.ValidationError as error:
            raise StudyError(f"{path}: line {number}: {error}; remove the line") from None
    return rows


def append_line(path: Path, row: Mapping[str, object]) -> None:
    """Adds one row to a line log, on a line of its own also after a torn one."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            file.write(b"\n" * torn)
        file.write(json.dumps(row).encode() + b"\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Folder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> Path:
        """A path inside the folder."""
        return self.path / name

    @property
    def trained(self) -> dict | None:
        """trained.json, or None while training is not finished. Raises StudyError if torn."""
        return read_json(self.file("trained.json"), Trained)

    @property
    def outcome(self) -> str | None:
        """How training ended, trained or diverged; None while it has not."""
        return (self.trained or {}).get("outcome")

    def digest(self, name: str) -> str:
        """SHA-256 that training wrote of one of its files. Raises StudyError where it did not."""
        known = (self.trained or {"sha256": {}})["sha256"]
        if name not in known:
            raise StudyError(f"{self.file('trained.json')}: no SHA-256 of {name}")
        return known[name]

    def _trained(self, run: Run) -> dict | None:
        """The same, once it is found to be this run's."""
        trained = self.trained
        if trained and trained["id"] != run.id:
            path = self.file("trained.json")
            raise StudyError(f"{path}: belongs to run {trained['id']!r}, not to {run.id}{REMOVE}")
        return trained

    def create(self, run: Run, identity: Mapping[str, object]) -> None:
        """Makes the folder; run.json is written first and never changed."""
        self.file("snapshots").mkdir(parents=True, exist_ok=True)
        self.file("measures").mkdir(exist_ok=True)
        for stale in (*self.path.glob(".*"), *self.path.glob("*/.*")):
            stale.unlink()  # left by a killed writer: we hold the lock, so nobody is writing
        known = read_json(self.file("run.json"), dict)
        if known is None:
            write_json(self.file("run.json"), identity)
        elif known.get("id") != run.id:
            raise StudyError(f"{self.path}: run.json belongs to run {known.get('id')}")

    @contextmanager
    def lock(self, patience: float = 0.5) -> Iterator[bool]:
        """Holds the run's lock; yields False where another process has it for longer than
        `patience` seconds, which ride out a glance by `locked`."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.file("lock"))
        try:
            held = lock.acquire(timeout=patience, poll_interval=0.05)
        except Timeout:
            yield False
            return
        with held:
            yield True

    @property
    def locked(self) -> bool:
        """Whether a living process holds the lock."""
        if not self.file("lock").exists():
            return False
        with self.lock(patience=0) as mine:
            return not mine

    def due(self, run: Run, thorough: bool = False) -> list:
        """Settings asked of the run at points it has a snapshot for, and not yet measured.

        thorough: a measurement that cannot be read is due again.
        """
        trained = self._trained(run)
        if trained is None or trained["outcome"] != "trained":
            return []
        points = {s["at"] for s in trained["snapshots"]}
        folder = self.file("measures")
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        return [
            m
            for m in run.measures
            if m.at in points
            and (m.file not in there or (thorough and not self._readable(run, m.file)))
        ]

    def _readable(self, run: Run, measurement: str) -> bool:
        try:
            found = read_json(self.file(f"measures/{measurement}"), Measured)
        except StudyError:  # it is made again
            return False
        ours = found is not None and found["id"] == run.id
        return ours and not foreign(self.trained or {}, measurement, found)

    def complete(self, run: Run, thorough: bool = False) -> bool:
        """Whether training has ended and everything asked of its snapshots is there."""
        trained = self._trained(run)
        return trained is not None and (
            trained["outcome"] == "diverged"
            or (not self.due(run, thorough) and self.file("samples.png").exists())
        )

    def state(self, run: Run, thorough: bool = False) -> str:
        """running, failed, done or one of LEFT; thorough: measurements are read."""
        if not self.path.exists():
            return "pending"
        if self.complete(run, thorough):
            return "done"
        if self.locked:
            return "running"
        last = self.last()
        if last.get("event") == "end" and last.get("reason") not in ENDED_WELL:
            return "failed"
        return "to measure" if self.trained else "interrupted" if last else "pending"

    def progress(self) -> dict | None:
        """The last row of steps.jsonl: how far training is. None where that can't be said: it is
        only shown, and the run that goes on from there says why."""
        try:
            rows = read_lines(self.file("steps.jsonl"), Step)
        except StudyError:
            return None
        return rows[-1] if rows else None

    def reason(self) -> str:
        """Why the last attempt ended."""
        return self.last().get("reason", "")

    def last(self) -> dict:
        """The last row of its attempts; empty where there is none."""
        return (read_lines(self.file("attempts.jsonl"), Attempt) or [{}])[-1]


class Store:
    """results/STUDY: the study's resolved file and its runs."""

    def __init__(self, results: Path, study: Study) -> None:
        self.path, self.study = results / study.name, study
        runs = self.path / "runs"
        inside(self.path, results)
        check_entries(self.path, results, folders=("runs", "slurm"))
        check_entries(self.path / "slurm", results)
        existing: dict[str, Path] = {}
        for path in sorted(runs.glob("*-*")):
            name = path.name.rpartition("-")[2]
            other = existing.setdefault(name, path)
            if name in study.unique and other != path:
                raise StudyError(f"{path}: {other.name} is of the same run, {name}; remove one")
        self.folders = {
            run.id: Folder(existing.get(run.id, runs / run.folder))
            for run in study.unique.values()
        }
        self.orphans = [p for i, p in existing.items() if i not in self.folders]
        for folder in (f.path for i, f in self.folders.items() if i in existing):
            inside(folder, results)
            check_entries(folder, results, FILES, FOLDERS)
            for name in FOLDERS:
                check_entries(folder / name, results)

    def write_study(self, source: Path) -> None:
        """study.yaml as given and study.json as resolved, folders by the names they have."""
        resolved = self.study.as_json()
        for run in resolved["runs"]:
            run["folder"] = self.folders[run["id"]].path.name
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_bytes(self.path / "study.yaml", source.read_bytes())
            write_json(self.path / "study.json", resolved)
        except OSError as error:
            raise StudyError(f"{self.path}: cannot be written: {error.strerror}") from None

    def states(self, runs: Iterable[Run] | None = None, thorough: bool = False) -> dict[str, str]:
        """State by run id, of all runs unless some are given."""
        asked = self.study.unique.values() if runs is None else runs
        return {r.id: self.folders[r.id].state(r, thorough) for r in asked}

    def blocked(self, run: Run, retry: bool = False) -> str | None:
        """Why this run can't be made: a source that failed (unless it is tried again) or diverged;
        None where it can."""
        for source in (self.study.unique[i] for i in run.reads):
            folder = self.folders[source.id]
            outcome = folder.outcome
            failed = outcome is None and not retry and folder.state(source) == "failed"
            if failed or outcome == "diverged":
                return f"its source {source.recipe.name} {outcome or 'failed'}"
            if outcome is None and (why := self.blocked(source, retry)):
                return why
        return None

    def ready(self, waiting: Iterable[Run]) -> Iterator[Run]:
        """The runs whose referenced runs are all trained."""
        for run in waiting:
            if all(self.folders[i].outcome == "trained" for i in run.reads):
                yield run
