"""The launcher of one machine: runs in an order their sources allow, one process each.

Processes come from a fork server that has loaded torch once. On CPUs there are N workers of one
thread; on GPUs one run per GPU, or as many as are asked for, which then compute at once. The
launcher holds no state: it asks the folders.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from functools import partial
from itertools import takewhile
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from rich.console import Console

from study.entry import main
from study.errors import StudyError
from study.progress import Display, say
from study.sharing import sharing
from study.spec import Run
from study.store import LEFT, Store, append_line, now

POLL = 0.1  # seconds between looks at the processes
FOREIGN = 2.0  # seconds between looks at runs that another launcher works on
BUSY, STOPPED = 75, 76  # the worker's exit statuses; importing it here would bring torch

# SIGUSR2 is what Slurm sends ahead of a time limit
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGUSR2)


def gpus() -> int:
    """How many GPUs this process may use, without asking torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        named = (d.strip() for d in os.environ["CUDA_VISIBLE_DEVICES"].split(","))
        # what is no device hides all that follows, as CUDA reads it
        return len(list(takewhile(lambda d: d and not d.startswith("-"), named)))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def devices(device: str, workers: int | None) -> list[str]:
    """The device of each worker slot. Raises StudyError where a GPU is asked for and none is
    there."""
    count = gpus()
    if device == "cuda" and not count:
        raise StudyError("--device cuda: no GPU here; use --device cpu")
    if device == "cpu" or not count:
        return ["cpu"] * (len(os.sched_getaffinity(0)) if workers is None else max(1, workers))
    slots = count if workers is None else max(1, workers)
    return [f"cuda:{i % count}" for i in range(slots)]


class Launcher:
    """Works on what is missing of a study until nothing is left, or until told to stop."""

    def __init__(
        self,
        store: Store,
        wanted: list[Run],
        slots: list[str],
        console: Console,
        retry: bool = False,
    ) -> None:
        self.store, self.slots, self.say = store, slots, partial(say, console)
        self.all = store.study.unique
        states = store.states(wanted, thorough=True)
        done = {i for i, state in states.items() if state == "done"}
        self.display = Display(console, wanted, done, store.folders)
        skip = {"done"} if retry else {"done", "failed"}
        self.waiting = {r.id: r for r in wanted if states[r.id] not in skip}
        self.active: dict[int, tuple[Run, multiprocessing.process.BaseProcess]] = {}
        self.foreign: dict[str, float] = {}  # runs that another launcher has: when to look again
        self.stopping = False

    def stop(self, *_: object) -> None:
        """Starts nothing more; running processes save at their next step."""
        self.stopping = True

    def run(self, deadline: float | None, in_process: bool) -> None:
        """Works until done, `deadline` (time.monotonic) or a signal."""
        before = {s: signal.signal(s, self.stop) for s in STOP_SIGNALS}
        if self.waiting:
            self.say(f"{len(self.waiting)} runs to work on, {len(self.slots)} at a time on "
                     f"{', '.join(sorted(set(self.slots)))}")  # fmt: skip
        try:
            with self.display, sharing(self.slots[: len(self.waiting)], self.say):
                self._here(deadline) if in_process else self._pool(deadline)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _here(self, deadline: float | None) -> None:
        """Everything in this process, one run after the other."""
        from study import worker

        if deadline is not None:  # an alarm, which the worker takes as a request to stop
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, deadline - time.monotonic()))
        while not self.stopping and (run := self._next()):
            if deadline is not None and time.monotonic() > deadline:
                return
            self.display.started(run)
            result = worker.work(run, self.all, self.store.folders, self.slots[0])
            self.stopping |= result == worker.STOPPED
            self.display.ended(run, self.store.folders[run.id].state(run))

    def _next(self) -> Run | None:
        for run in self.store.ready(self.waiting.values()):
            if self.foreign.get(run.id, 0) <= time.monotonic():
                return self.waiting.pop(run.id)
        return None

    def _pool(self, deadline: float | None) -> None:
        """One process per run, as many at once as there are slots."""
        told = False
        # A terminal sends Ctrl-C to every process; only the launcher listens, and passes it on.
        # The fork server is deaf: without it the launcher could not wait for the workers.
        resource_tracker.ensure_running()  # first: it unblocks the signal itself
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        multiprocessing.set_forkserver_preload(["study.worker"])
        forkserver.ensure_running()  # it and its children inherit the mask
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            while self.active or (self.waiting and not self.stopping):
                self.stopping |= deadline is not None and time.monotonic() > deadline
                if self.stopping and not told:
                    self._terminate()  # SIGTERM: save at the next step boundary
                    told = True
                if not self.stopping:
                    self._fill()
                time.sleep(POLL)
                for slot, (run, process) in list(self.active.items()):
                    if process.is_alive():
                        self.display.progress(run, self.store.folders[run.id].progress())
                    else:
                        process.join()
                        del self.active[slot]
                        self._ended(run, process.exitcode)
                ready = self.store.ready(self.waiting.values())
                if not self.active and not self.foreign and not any(ready):
                    return  # what waits needs a source that failed or diverged
        finally:
            self._terminate()

    def _terminate(self) -> None:
        for _, process in self.active.values():
            process.terminate()

    def _fill(self) -> None:
        """Starts a ready run in every free slot."""
        context = multiprocessing.get_context("forkserver")
        for slot, device in enumerate(self.slots):
            if slot in self.active:
                continue
            run = self._next()
            if run is None:
                return
            folders = {i: self.store.folders[i] for i in (run.id, *run.reads)}
            sources = {i: self.all[i] for i in run.reads}
            process = context.Process(target=main, args=(run, sources, folders, device))
            process.start()
            self.active[slot] = (run, process)
            self.display.started(run)

    def _ended(self, run: Run, code: int) -> None:
        """Takes note of a process that is gone, also of one that could not say why."""
        folder = self.store.folders[run.id]
        if code == BUSY:
            self.waiting[run.id] = run
            self.foreign[run.id] = time.monotonic() + FOREIGN
            return self.display.ended(run, None)
        self.foreign.pop(run.id, None)
        lost = folder.state(run) in LEFT and code != STOPPED
        if lost and not self.stopping:  # a child that was asked to stop may die before it can hear
            why = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
            row = {"event": "end", "time": now(), "reason": f"the process was lost: {why}"}
            try:
                folder.path.mkdir(parents=True, exist_ok=True)
                append_line(folder.file("attempts.jsonl"), row)
            except OSError as error:  # full or read-only: say it here, since the folder can't
                self.say(f"{folder.path}: {row['reason']}; {error}")
        self.display.ended(run, folder.state(run))
