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
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from study.errors import StudyError
from study.spec import Run, Study

ENDED_WELL = ("done", "stopped")


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


def read_json(path: Path) -> Any | None:  # noqa: ANN401
    """The file's value, or None where there is no such file. Raises StudyError on a torn one."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StudyError(
            f"{path}: not readable as JSON ({error}); remove it to have it made again"
        ) from None


def read_lines(path: Path) -> list[dict]:
    """The rows of a line log; a line that a crash cut short is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with suppress(ValueError):  # a torn line: what it would have said is lost
            rows.append(json.loads(line))
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
        path = self.file("trained.json")
        value = read_json(path)
        if value is not None and not (isinstance(value, dict) and "outcome" in value):
            raise StudyError(f"{path}: not what training writes; remove it to have it made again")
        return value

    def create(self, run: Run, identity: Mapping[str, object]) -> None:
        """Makes the folder; run.json is written first and never changed."""
        self.file("snapshots").mkdir(parents=True, exist_ok=True)
        self.file("measures").mkdir(exist_ok=True)
        for stale in (*self.path.glob(".*"), *self.path.glob("*/.*")):
            stale.unlink()  # left by a killed writer: we hold the lock, so nobody is writing
        known = read_json(self.file("run.json"))
        if known is None:
            write_json(self.file("run.json"), identity)
        elif known.get("id") != run.id:
            raise StudyError(f"{self.path}: run.json belongs to run {known.get('id')}")

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Holds the run's lock; yields False where another process has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.file("lock"))
        try:
            lock.acquire(timeout=0.5, poll_interval=0.05)  # rides out a glance by `locked`
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @property
    def locked(self) -> bool:
        """Whether a living process holds the lock."""
        if not self.file("lock").exists():
            return False
        lock = FileLock(self.file("lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def due(self, run: Run, thorough: bool = False) -> list:
        """Settings asked of the run at points it has a snapshot for, and not yet measured.

        thorough: a measurement that cannot be read is due again.
        """
        trained = self.trained
        if trained is None or trained["outcome"] != "trained":
            return []
        points = {s["at"] for s in trained["snapshots"]}
        folder = self.file("measures")
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        return [
            m
            for m in run.measures
            if m.at in points
            and (m.file not in there or (thorough and not self._readable(m.file)))
        ]

    def _readable(self, measurement: str) -> bool:
        try:
            return read_json(self.file(f"measures/{measurement}")) is not None
        except StudyError:
            return False

    def complete(self, run: Run, thorough: bool = False) -> bool:
        """Whether training has ended and everything asked of its snapshots is there."""
        trained = self.trained
        return trained is not None and (
            trained["outcome"] == "diverged"
            or (not self.due(run, thorough) and self.file("samples.png").exists())
        )

    def state(self, run: Run, thorough: bool = False) -> str:
        """pending, running, interrupted, failed or done; thorough: measurements are read."""
        if not self.path.exists():
            return "pending"
        if self.complete(run, thorough):
            return "done"
        if self.locked:
            return "running"
        attempts = read_lines(self.file("attempts.jsonl"))
        if not attempts:
            return "pending"
        last = attempts[-1]
        failed = last["event"] == "end" and last["reason"] not in ENDED_WELL
        return "failed" if failed else "interrupted"

    def progress(self) -> dict | None:
        """The last row of steps.jsonl: how far training is."""
        rows = read_lines(self.file("steps.jsonl"))
        return rows[-1] if rows else None

    def reason(self) -> str:
        """Why the last attempt ended."""
        return read_lines(self.file("attempts.jsonl"))[-1].get("reason", "")


class Store:
    """results/STUDY: the study's resolved file and its runs."""

    def __init__(self, results: Path, study: Study) -> None:
        self.path, self.study = results / study.name, study
        runs = self.path / "runs"
        existing = {p.name.rpartition("-")[2]: p for p in sorted(runs.glob("*-*"))}
        self.folders = {
            run.id: Folder(existing.get(run.id, runs / run.folder))
            for run in study.unique.values()
        }
        self.orphans = [p for i, p in existing.items() if i not in self.folders]

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

    def states(self, thorough: bool = False) -> dict[str, str]:
        """State by run id."""
        return {r.id: self.folders[r.id].state(r, thorough) for r in self.study.unique.values()}

    def blocked(self, run: Run) -> str | None:
        """Why this run can't be made: a source that failed or diverged; None where it can."""
        for source in (self.study.unique[i] for i in run.reads):
            folder = self.folders[source.id]
            outcome = (folder.trained or {}).get("outcome")
            if outcome == "diverged" or (outcome is None and folder.state(source) == "failed"):
                return f"its source {source.recipe.name} {outcome or 'failed'}"
            if outcome is None and (why := self.blocked(source)):
                return why
        return None

    def ready(self, waiting: Iterable[Run]) -> Iterator[Run]:
        """The runs whose referenced runs are all trained."""
        for run in waiting:
            if all((self.folders[i].trained or {}).get("outcome") == "trained" for i in run.reads):
                yield run
