"""What a job on Slurm does: works through the runs it is given, one after the other.

A signal (a time limit, a preemption) sets a flag; the run saves at its next step. Then submitit's
own handler requeues the job, unless Slurm has taken it away already: then that is Slurm's to do.
Its exit status is not 0 where a run failed or waits for a source that did, as the command's own,
and only after all its runs were tried: Slurm then counts it among what failed, and nothing is
requeued for it.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from study.errors import StudyError, several
from study.launch import Launcher, devices
from study.pinned import code
from study.progress import label
from study.queued import asked, own_job
from study.resolve import load
from study.spec import Run
from study.store import LEFT, Store

ALIVE = ("RUNNING", "SIGNALING")  # the latter while a signal of Slurm's is on its way


def _state() -> str:
    """What Slurm takes this job for: COMPLETING once it is cancelled or requeued, else ALIVE."""
    # ARRAY_INDEX: the plain number of an array's last job means the whole array to squeue
    told = asked("squeue", "--noheader", f"--jobs={own_job()}", "--format=%T")
    return (told or "").strip() or "unknown"


class Job:
    """What a job does. submitit pickles this class's name and plain values, nothing else."""

    def __call__(self, file: str, sets: list[str], results: str, device: str, retry: bool,
                 ids: list[str]) -> None:
        """Works through the runs; at a signal saves, and has the job requeued if it is due."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is in flight yet
        print(f"python {sys.executable}, code {code()['code']}", flush=True)
        try:
            lost = self._work(Path(file), tuple(sets), Path(results), device, retry, ids)
        except StudyError as error:
            lost = f"error: {error}"
        if lost:
            sys.exit(lost)

    def _work(self, file: Path, sets: tuple[str, ...], results: Path, device: str, retry: bool,
              ids: list[str]) -> str:
        """The same; returns what failed."""
        study = load(file, sets)
        store = Store(results, study)
        runs, folders = [study.unique[i] for i in ids], store.folders
        # one that failed in this very job is not tried again when the job is requeued
        todo = [r for r in runs if not (own_job() and folders[r.id].last().get("job") == own_job()
                                        and folders[r.id].state(r) == "failed")]
        launcher = Launcher(store, todo, devices(device, 1)[:1], Console(), retry)
        launcher.run(None, in_process=True)
        states = store.states(runs)
        left = [r for r in runs if states[r.id] in LEFT]
        state = _state() if launcher.stopping and left else ""
        if state in ALIVE:
            signal.raise_signal(signal.SIGUSR2)  # submitit's handler, which requeues
        for run in left:
            print(f"left: {label(run)}: {_why(store, run, state)}", flush=True)
        counts = {"failed": sum(s == "failed" for s in states.values()),
                  "blocked": sum(bool(store.blocked(r)) for r in left)}
        told = [f"{n} {name}" for name, n in counts.items() if n]
        return f"error: of {several(len(runs), 'run')}: {', '.join(told)}" if told else ""

    def checkpoint(self, *arguments: Any) -> Any:  # noqa: ANN401
        """What submitit requeues: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def _why(store: Store, run: Run, state: str) -> str:
    """Why a run was left, and what becomes of it; state: the job's, if it was stopped."""
    if why := store.blocked(run):
        lost = store.blocked(run, retry=True)
        return f"{why}; {'it cannot be made' if lost else '--retry tries both again'}"
    if missing := [label(store.study.unique[i]) for i in run.reads
                   if store.folders[i].trained is None]:  # fmt: skip
        return f"not trained: {', '.join(missing)}; give the same command again"
    if state:
        return f"the job is {state.lower()}; unless Slurm requeues it, give the same command again"
    return "another job or launcher had it; give the same command again"
