"""What Slurm holds of a study: asked of Slurm by its own commands, told by the records that every
submission leaves in results/STUDY/slurm.

Clusters number their jobs alike, so a record names its cluster, and is that cluster's alone. One
without a name is taken for this cluster's: an earlier version left it, or Slurm gave no name.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from study.store import read_json

FOLDER = "slurm"  # in results/STUDY
SECONDS = 60  # that a question to Slurm may take


def config() -> dict[str, str]:
    """What Slurm says of its configuration; nothing where it does not."""
    told = asked("scontrol", "show", "config") or ""
    return dict(re.findall(r"^(\w+) *= *(\S+)", told, re.MULTILINE))


def limit(told: Mapping[str, str]) -> int | None:
    """How many jobs an array may have here; None where Slurm does not say."""
    number = told.get("MaxArraySize", "")
    return max(1, int(number)) if number.isdecimal() else None


def asked(*words: str) -> str | None:
    """What a Slurm command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def withdraw(folder: Path) -> None:
    """Cancels what Slurm has taken of an array's folder, told by the script's path, and removes
    the folder."""
    told = asked("squeue", "--noheader", f"--user={os.geteuid()}", "--format=%F %o") or ""
    lines = [line.partition(" ") for line in told.splitlines()]
    taken = {number for number, _, script in lines if script.startswith(f"{folder}/")}
    if taken:
        asked("scancel", *sorted(taken))
    shutil.rmtree(folder, ignore_errors=True)


class Record(TypedDict):
    """What is read of an array's record; older ones lie beside their logs, and name no cluster."""

    time: str
    jobs: list[list[str]]
    cluster: NotRequired[str]
    folder: NotRequired[str]


class Queue:
    """What a study has submitted, by the records it left, and what of it Slurm still holds."""

    def __init__(self, path: Path) -> None:
        self.folder = path / FOLDER
        self.job: dict[str, str] = {}  # the job that a run was last given to
        self.logs: dict[str, Path] = {}  # by job
        records = [(number, read_json(p, Record)) for p in self.folder.glob("*.json")
                   if (number := p.stem.rpartition("-")[2]).isdecimal()]  # fmt: skip
        names = Counter(r["cluster"] for _, r in records if "cluster" in r)
        here = config().get("ClusterName") if names else None
        others = {n: count for n, count in names.items() if here and n != here}
        self.others = [f"{count} array{'s' * (count > 1)} of cluster {name!r} left out: this is "
                       f"cluster {here!r}" for name, count in sorted(others.items())]  # fmt: skip
        records = [(number, r) for number, r in records if r.get("cluster") not in others]
        for array, record in sorted(records, key=lambda r: (r[1]["time"], int(r[0]))):
            single = len(record["jobs"]) == 1  # such a job is no array
            for i, ids in enumerate(record["jobs"]):
                job = array if single else f"{array}_{i}"
                self.job |= dict.fromkeys(ids, job)
                self.logs[job] = self.folder / record.get("folder", "") / f"{job}_0_log.out"
        # a queue that can't be asked holds nothing, as far as anyone can say
        words = "squeue", "--noheader", "--array", f"--user={os.geteuid()}", "--format=%i %T"
        told = asked(*words) if self.job else ""
        self.known = told is not None
        states = dict(line.split() for line in (told or "").splitlines() if line)
        self.held = {run: states[job] for run, job in self.job.items() if job in states}

    def lines(self, study_states: dict[str, str]) -> list[str]:
        """A line for each job that Slurm holds, and for each that is gone and left work."""
        runs: dict[str, list[str]] = {}
        for run, job in self.job.items():
            if study_states.get(run, "done") not in ("done", "failed"):
                runs.setdefault(job, []).append(run)
        lines = list(self.others)
        if not self.known:
            lines.append("squeue does not answer: what is queued is not known")
        for job, ids in runs.items():
            state = self.held.get(ids[0])
            count = f"{len(ids)} run{'s' * (len(ids) > 1)}"
            if state:
                lines.append(f"job {job}: {state.lower()}, {count} to do; log: {self.logs[job]}")
            elif self.known:
                lines.append(f"job {job}: gone, {count} not done; log: {self.logs[job]}")
        return lines
