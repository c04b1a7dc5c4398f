"""What Slurm holds of a study: asked of Slurm by its own commands, told by the records that every
submission leaves in results/STUDY/slurm."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TypedDict

from study.store import read_json

FOLDER = "slurm"  # in results/STUDY
SECONDS = 60  # that a question to Slurm may take


def limit() -> int | None:
    """How many jobs an array may have here; None where Slurm does not say."""
    told = asked("scontrol", "show", "config") or ""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", told, re.MULTILINE)
    return max(1, int(found[1])) if found else None


def asked(*words: str) -> str | None:
    """What a Slurm command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


class Record(TypedDict):
    """What is read of an array's record."""

    time: str
    jobs: list[list[str]]


class Queue:
    """What a study has submitted, by the records it left, and what of it Slurm still holds."""

    def __init__(self, path: Path) -> None:
        self.folder = path / FOLDER
        self.job: dict[str, str] = {}  # the job that a run was last given to
        files = [p for p in self.folder.glob("*.json") if p.stem.isdecimal()]
        records = [(p.stem, read_json(p, Record)) for p in files]
        for array, record in sorted(records, key=lambda r: (r[1]["time"], int(r[0]))):
            single = len(record["jobs"]) == 1  # such a job is no array
            for i, ids in enumerate(record["jobs"]):
                self.job |= dict.fromkeys(ids, array if single else f"{array}_{i}")
        # a queue that can't be asked holds nothing, as far as anyone can say
        words = "squeue", "--noheader", "--array", f"--user={os.geteuid()}", "--format=%i %T"
        told = asked(*words) if self.job else ""
        self.known = told is not None
        states = dict(line.split() for line in (told or "").splitlines() if line)
        self.held = {run: states[job] for run, job in self.job.items() if job in states}

    def log(self, job: str) -> Path:
        """Where a job's output goes."""
        return self.folder / f"{job}_0_log.out"

    def lines(self, study_states: dict[str, str]) -> list[str]:
        """A line for each job that Slurm holds, and for each that is gone and left work."""
        runs: dict[str, list[str]] = {}
        for run, job in self.job.items():
            if study_states.get(run, "done") not in ("done", "failed"):
                runs.setdefault(job, []).append(run)
        lines = [] if self.known else ["squeue does not answer: what is queued is not known"]
        for job, ids in runs.items():
            state = self.held.get(ids[0])
            count = f"{len(ids)} run{'s' * (len(ids) > 1)}"
            if state:
                lines.append(f"job {job}: {state.lower()}, {count} to do; log: {self.log(job)}")
            elif self.known:
                lines.append(f"job {job}: gone, {count} not done; log: {self.log(job)}")
        return lines
