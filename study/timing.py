"""What one update of a run costs on this device: time, memory, arithmetic, measurements.

Weights are the initial ones and teachers are untrained, which costs the same. An update is taken
as training takes it, data on the device, optimiser and averages included.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from study import worker
from study.budget import Spend, passes
from study.data import Dataset
from study.errors import StudyError
from study.forecast import is_timed, step_key
from study.identity import digest
from study.measure import measure
from study.models import initial
from study.settings import Settings
from study.spec import Run, Study
from study.store import Folder, read_json
from study.student import Student, counted, free_memory
from study.train import finish, set_up, untrained
from study.weights import save_tensors, snapshot_name

WARM_UP = 5  # updates before the clock starts
TOGETHER = 5.0  # seconds for which several processes train at once
SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices whose product is the ceiling
CEILING = 5.0  # seconds for it: a CPU takes long over half precision


def steps_of(runs: list[Run]) -> dict[str, Run]:
    """One run for each step that costs something of its own; what is never trained left out."""
    result: dict[str, Run] = {}
    for run in runs:
        if is_timed(run):
            result.setdefault(step_key(run), run)
    return result


class Site:
    """A study's runs on one device, in a folder of their own, with sources as they start out."""

    def __init__(self, study: Study, device: torch.device, folder: Path) -> None:
        self.study, self.device, self.all = study, device, study.unique
        self.folders = {i: Folder(folder / run.folder) for i, run in self.all.items()}

    def dataset(self, run: Run) -> Dataset:
        """The run's data on the device."""
        return worker.data_of(run.recipe.factors, self.device)

    def _facts(self, run: Run) -> dict[str, Any]:
        dataset = self.dataset(run)
        return {"id": run.id, "data_digest": dataset.digest, "inputs": {}}

    def source(self, name: str) -> None:
        """A source's folder with the weights it starts from, and those of what it reads."""
        run, folder = self.all[name], self.folders[name]
        if folder.trained is None:
            for other in run.refs.values():
                self.source(other)
            folder.create(run, {"id": name})
            net = initial(run, self.all, self.folders.__getitem__, self.dataset(run))
            untrained(folder, self._facts(run), net, run.recipe.factors.weights_ema)

    def student(self, run: Run) -> Student:
        """The run at its first update, its step not yet captured."""
        for name in run.reads:
            self.source(name)
        lookup, dataset = self.folders.__getitem__, self.dataset(run)
        first = initial(run, self.all, lookup, dataset)
        return Student(run, self.all, lookup, dataset, self.device, first)

    def measured(self, run: Run, student: Student) -> dict[str, float]:
        """Seconds that each measurement of the last snapshot takes, by `measure_key`."""
        folder = self.folders[run.id]
        folder.create(run, {"id": run.id})
        save_tensors(folder.file(snapshot_name(1.0)), student.snapshot())
        at = [{"at": 1.0, "images": 0, "file": snapshot_name(1.0)}]
        finish(folder, self._facts(run), "trained", None, Spend(), at)
        last = replace(run, measures=tuple(m for m in run.measures if m.at == 1.0))
        lookup = self.folders.__getitem__
        measure(last, self.all, lookup, self.dataset(run), self.device, lambda: False)
        folder.file("trained.json").unlink()  # another step may read this run as a source
        files = {measure_key(m): folder.file(f"measures/{m.file}") for m in last.measures}
        return {key: read_json(file)["seconds"] for key, file in files.items()}


def measure_key(settings: Settings) -> str:
    """Equal for measurements that cost the same: at other progress, of another seed."""

    def nameless(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, Mapping):
            return {k: nameless(v) for k, v in value.items() if k not in ("run", "teachers")}
        return value

    return f"{settings.record['kind']}-{digest(nameless(settings.record), 16)}"


def updates(student: Student) -> Iterator[None]:
    """Updates without end, along the budget and from its start again."""
    batch, images = student.factors.batch, student.factors.budget.images
    while True:
        for start in range(0, images, batch):
            student.update(start)
            yield


def seconds(student: Student, steps: int, device: torch.device) -> tuple[float, float]:
    """Median seconds of one update, and seconds until the first one was done."""
    cuda = device.type == "cuda"

    def mark() -> Any:  # noqa: ANN401 - an event on a GPU, else a time
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    start = time.perf_counter()
    student.capture()
    going = updates(student)
    next(going)
    if cuda:
        torch.cuda.synchronize(device)
    first = time.perf_counter() - start
    for _ in range(WARM_UP):
        next(going)
    marks = [mark()]
    for _ in range(steps):
        next(going)
        marks.append(mark())
    if cuda:
        torch.cuda.synchronize(device)
    pairs = zip(marks, marks[1:], strict=False)
    each = [a.elapsed_time(b) / 1000 if cuda else b - a for a, b in pairs]
    return statistics.median(each), first


def forget() -> None:
    """Empties what functions of this package keep for the next time: data, features, posteriors
    would otherwise count as the memory of whoever comes next."""
    for name, module in list(sys.modules.items()):
        if name.startswith("study."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    gc.collect()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills in "mebibytes", the most in use meanwhile: on a GPU by tensors, data included, else by
    this process."""
    found: dict[str, float] = {}
    forget()
    if device.type == "cuda":
        free_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found["mebibytes"] = torch.cuda.max_memory_allocated(device) / 2**20
        return
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to reset VmHWM
    yield found
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    found["mebibytes"] = int(peak.split()[1]) / 2**10


def forward_flops(student: Student) -> float:
    """FLOPs of one image's forward pass."""
    one = student.draws(0, 1)
    with torch.no_grad(), counted() as flops:
        student.net(one.x, torch.zeros(1, device=one.x.device))
    return flops()


def ceiling(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of some large square matrix products, in this precision or in float32,
    which a CPU may be faster in: what the device can do at most."""
    n, best = SIDE[device.type], float("inf")
    for dtype in {getattr(torch, precision), torch.float32}:
        a = torch.randn(n, n, device=device).to(dtype)
        end = time.perf_counter() + CEILING
        for _ in range(20):
            start = time.perf_counter()
            a @ a
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            best = min(best, now - start)
            if now > end:
                break
    return 2 * n**3 / best


def timed(site: Site, run: Run, steps: int, measures: bool) -> dict[str, Any]:
    """All figures of one step."""
    set_up()
    factors = run.recipe.factors
    with peak_memory(site.device) as peak:
        student = site.student(run)
        update, first = seconds(student, steps, site.device)
    flops = forward_flops(student) * passes(factors)
    return {
        "batch": factors.batch,
        "precision": factors.precision,
        "parameters": sum(w.numel() for w in student.weights),
        "seconds_per_image": update / factors.batch,
        "flops_per_image": flops,
        "first_update_seconds": first,
        "peak_mebibytes": peak["mebibytes"],
        "measures": site.measured(run, student) if measures else {},
    }


def determinism(site: Site, run: Run, steps: int) -> tuple[float, float]:
    """How many times as long a step takes as with kernels chosen by trial, for speed alone; and
    how far two timings of the same step lie apart, as a share of it."""
    each = {True: [], False: []}
    for strict in (True, False, True, False):  # in turn: what drifts meets both
        set_up()
        torch.use_deterministic_algorithms(strict)
        torch.backends.cudnn.benchmark = not strict
        each[strict].append(seconds(site.student(run), steps, site.device)[0])
    set_up()
    spread = max(abs(a - b) / (a + b) * 2 for a, b in each.values())
    return sum(each[True]) / sum(each[False]), spread


def train_together(
    study: Study, name: str, device: str, folder: Path, barrier: Barrier, counts: Any  # noqa: ANN401
) -> None:
    """One of several processes: images trained on within the time that all take part in."""
    set_up()
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    run = study.unique[name]
    student = Site(study, place, folder).student(run)
    student.capture()
    going, images = updates(student), 0
    for _ in range(WARM_UP):
        next(going)
    barrier.wait()
    end = time.perf_counter() + TOGETHER
    while time.perf_counter() < end:
        next(going)
        images += run.recipe.factors.batch
        if place.type == "cuda" and images % (64 * run.recipe.factors.batch) == 0:
            torch.cuda.synchronize(place)  # else what is queued would count as done
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    counts.put(images / (time.perf_counter() - end + TOGETHER))


def together(study: Study, run: Run, device: str, workers: int) -> float:
    """Images per second of all processes that train this run at once. On a GPU they take turns,
    unless the fork server started inside `sharing`, as the launcher's does."""
    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(["study.timing"])
    barrier, counts = context.Barrier(workers), context.Queue()
    with TemporaryDirectory() as folder:
        pool = [
            context.Process(
                target=train_together,
                args=(study, run.id, device, Path(folder, str(i)), barrier, counts),
            )
            for i in range(workers)
        ]
        for process in pool:
            process.start()
        going = {process.sentinel: process for process in pool}
        while going:  # one that dies leaves the others waiting for it
            for ended in wait(list(going)):
                process = going.pop(ended)
                process.join()
                if process.exitcode:
                    for other in going.values():
                        other.terminate()
                    raise StudyError(f"{run.folder}: one of {workers} processes at once failed "
                                     f"(exit status {process.exitcode})")  # fmt: skip
        return sum(counts.get() for _ in pool)
