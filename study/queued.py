"""What Slurm holds of a study: asked of Slurm by its own commands, told by the records that every
submission leaves in results/STUDY/slurm.

Clusters number their jobs alike, so a record names its cluster, and is that cluster's alone. One
without a name is taken for this cluster's: an earlier version left it, or Slurm gave no name. The
user's variables that would change what a command of Slurm's means are kept from it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NotRequired, TypedDict

from study.bounded import content, decoded
from study.errors import StudyError, printable, several
from study.store import Folder

FOLDER = "slurm"  # in results/STUDY
SILENT = "squeue does not answer"
SECONDS = 60  # that a question to Slurm may take
FEW, NAMED = 6, 3  # jobs of an array that have a line each, runs of a job that are named
TAIL, LETTERS = 8192, 400  # bytes of a log in which its last line is looked for, letters told
NOISE = re.compile(r"srun: (error: \S+: tasks? |Terminating |Job step aborted)"  # no reason
                    r"|submitit INFO \(.*?\) - (Job completed|Exiting after) success")
WHOLE = ("error: ", "left: ")  # a job's own lines: what can be done stands at their end
HEAD = re.compile(r"\w[\w.]*: .*:$")  # an exception's line that is continued in the next
OVERRULING = ("SBATCH_", "SCANCEL_", "SCONTROL_", "SLURM_", "SQUEUE_", "SRUN_")
# where Slurm is and who asks; all else means something to a command, or is of another job
HARMLESS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_DEBUG_FLAGS", "SLURM_JWT")
GIVEN_UP = ("SLURM_CLUSTERS", "SLURM_HINT")  # of these, what a user sets for sbatch


def overruling() -> list[str]:
    """The environment's variables that Slurm's commands don't get to see."""
    return sorted(k for k in os.environ if k.startswith(OVERRULING) and k not in HARMLESS)


def set_for_sbatch() -> list[str]:
    """Those of them by which a user sets something for every job."""
    return [k for k in overruling() if k.startswith("SBATCH_") or k in GIVEN_UP]


@contextmanager
def plain() -> Iterator[None]:
    """Without them in this process, and so in what it starts."""
    taken = {k: os.environ.pop(k) for k in overruling()}
    try:
        yield
    finally:
        os.environ.update(taken)


def own_job() -> str | None:
    """The Slurm job that this process belongs to, as squeue --array has it; None outside of
    one."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


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
        with plain():
            done = subprocess.run(words, capture_output=True, text=True, check=False,
                                  timeout=SECONDS)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def withdraw(folder: Path) -> None:
    """Cancels what Slurm has taken of an array's folder, told by the script's path, and removes
    the folder."""
    told = asked("squeue", "--noheader", "--all", f"--user={os.geteuid()}", "--format=%F %o") or ""
    lines = [line.partition(" ") for line in told.splitlines()]
    taken = {number for number, _, script in lines if script.startswith(f"{folder}/")}
    if taken:
        asked("scancel", *sorted(taken))
    shutil.rmtree(folder, ignore_errors=True)


def ending(log: Path) -> str:
    """The last line of a job's log that says something, with the line above where it continues
    that; '' where there is none."""
    try:
        if not log.is_file():
            return ""
        with log.open("rb") as file:
            start = file.seek(max(0, log.stat().st_size - TAIL))
            text = "…" * (start > 0) + file.read(TAIL).decode(errors="replace")
    except OSError:
        return ""
    told = [line for line in text.splitlines() if line.strip() and not NOISE.match(line)]
    said = printable(" ".join(told[-2 if HEAD.match("".join(told[-2:-1])) else -1 :]).strip())
    return said if len(said) <= LETTERS or said.startswith(WHOLE) else f"{said[:LETTERS]}…"


class Record(TypedDict):
    """What is read of an array's record; older ones lie beside their logs, and name no cluster."""

    time: str
    jobs: list[list[str]]
    cluster: NotRequired[str]
    folder: NotRequired[str]
    retry: NotRequired[bool]


def _record(path: Path, array: str) -> Record | None:
    """An array's record; None where it was removed just now. Raises StudyError on a damaged one:
    nothing makes it again, and what it tells of may still be queued."""
    data = content(path)
    try:
        return None if data is None else decoded(data, Record, str(path))
    except StudyError as error:
        raise StudyError(f"{error}; nothing else tells what array {array} is to do: cancel what "
                         f"`squeue -j {array}` shows of it, then remove the file") from None


class Queue:
    """What a study has submitted, by the records it left, and what of it Slurm still holds."""

    def __init__(self, path: Path) -> None:
        self.folder = path / FOLDER
        self.job: dict[str, str] = {}  # the job that a run was last given to
        self.logs: dict[str, Path] = {}  # by job
        self.retries: set[str] = set()  # jobs that try failed runs again
        records = [(number, record) for p in self.folder.glob("*.json")
                   if (number := p.stem.rpartition("-")[2]).isdecimal()
                   and (record := _record(p, number))]  # fmt: skip
        names = Counter(r["cluster"] for _, r in records if "cluster" in r)
        here = config().get("ClusterName") if names else None
        others = {n: count for n, count in names.items() if here and n != here}
        self.others = [f"{several(count, 'array')} of cluster {name!r} left out: this is "
                       f"cluster {here!r}" for name, count in sorted(others.items())]  # fmt: skip
        records = [(number, r) for number, r in records if r.get("cluster") not in others]
        for array, record in sorted(records, key=lambda r: (r[1]["time"], int(r[0]))):
            single = len(record["jobs"]) == 1  # such a job is no array
            for i, ids in enumerate(record["jobs"]):
                job = array if single else f"{array}_{i}"
                self.job |= dict.fromkeys(ids, job)
                self.logs[job] = self.folder / record.get("folder", "") / f"{job}_0_log.out"
                self.retries |= {job} if record.get("retry") else set()
        # a queue that can't be asked holds nothing, as far as anyone can say
        words = "squeue", "--noheader", "--all", "--array", f"--user={os.geteuid()}"
        told = asked(*words, "--format=%i %T") if self.job else ""
        self.known = told is not None
        self.notes = self.others + [f"{SILENT}: what is queued is not known"] * (not self.known)
        lines = map(str.split, (told or "").splitlines())
        states = dict(words for words in lines if len(words) == 2)  # the rest is a site's message
        self.held = {run: states[job] for run, job in self.job.items() if job in states}

    def due(self, run: str, folder: Folder, state: str) -> bool:
        """Whether a job that Slurm holds will work on a run in this state: on one that failed
        only if it is to try it again, and has not yet."""
        if run not in self.held or state in ("done", "running"):
            return False
        job = self.job[run]
        return state != "failed" or (job in self.retries and folder.last().get("job") != job)

    def lines(self, states: Mapping[str, str], names: Mapping[str, str]) -> list[str]:
        """A line for each job that Slurm holds, and for each that is gone and left work; of many
        jobs of an array, one together. How logs end is said once where it is the same. states,
        names: of runs by id; other runs don't count."""
        runs: dict[str, list[str]] = {}
        for run, job in self.job.items():
            if states.get(run, "done") not in ("done", "failed"):
                runs.setdefault(job, []).append(run)
        groups: dict[tuple[str, str], list[str]] = {}
        for job, ids in runs.items():
            state = self.held.get(ids[0], "gone").lower()
            if state != "gone" or self.known:
                groups.setdefault((job.partition("_")[0], state), []).append(job)
        told: dict[tuple[bool, str], list[str]] = {}  # by how logs end, those of many jobs apart
        for (array, state), jobs in groups.items():
            for some in [jobs] if len(jobs) > FEW else [[job] for job in jobs]:
                line = self._line(array, state, some, [names[i] for j in some for i in runs[j]])
                ends = Counter(ending(self.logs[job]) for job in some if state == "gone")
                end = next((e for e, _ in ends.most_common() if e), "")
                told.setdefault((len(some) > 1, end), []).append(line)
        lines = []
        for (many, end), some in told.items():
            how = "most end" if many else "each ends" if len(some) > 1 else "it ends"
            lines += [*some, *([f"  {how}: {end}"] if end else [])]
        return lines

    def _line(self, array: str, state: str, jobs: list[str], runs: list[str]) -> str:
        """What these jobs of one array have to do, or have not done, and where they say why."""
        log, which = self.logs[jobs[0]], f"job {jobs[0]}"
        if len(jobs) > 1:
            log, which = log.with_name(f"{array}_*_0_log.out"), f"{len(jobs)} jobs of {array}"
        what = ", ".join(runs) if len(runs) <= NAMED else several(len(runs), "run")
        where, lost = f"log: {log}", not os.path.exists(log.parent)
        if lost:
            where = f"log: gone, as all of {log.parent}"
        elif state == "gone" and not any(os.path.exists(self.logs[job]) for job in jobs):
            where += " (not there: it never began, or its log was removed)"
        if state == "gone":
            return f"{which}: gone, not done: {what}; {where}"
        if lost and state != "running":  # payload and place for a log were there
            where += "; it cannot begin: scancel it, and give the same command again"
        return f"{which}: {state}, to do: {what}; {where}"
