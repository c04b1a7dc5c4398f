"""One run in one process: take its lock, train what is missing, measure what is missing.

The fork server preloads this module, and with it torch, which the launcher can do without.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch

from study import data, reference
from study.capture import usable
from study.errors import StudyError
from study.factors import Factors
from study.identity import SCHEMA, complete
from study.launch import BUSY, STOP_SIGNALS, STOPPED
from study.measure import measure
from study.models import Lookup, check_inputs
from study.pinned import code
from study.queued import own_job
from study.spec import Run
from study.store import Folder, append_line, now
from study.student import batch_that_fits, free_memory
from study.subjects import Data
from study.train import set_up, train

DONE, FAILED = 0, 1


@cache
def load(kind: Data, device: torch.device) -> data.Dataset:
    """The data set on a device, loaded once per process also where it works on several runs."""
    return data.load(kind).to(device)


@cache
def flipped(kind: Data, device: torch.device) -> data.Dataset:
    """The same data set, where training also meets its mirror images."""
    return replace(load(kind, device), flip=True)


def data_of(factors: Factors, device: torch.device) -> data.Dataset:
    """What a run trains on."""
    return (flipped if factors.augment == "flip" else load)(factors.data, device)


CODE = code()


def job() -> dict[str, str]:
    """The Slurm job that this is part of, as a row has it; nothing elsewhere."""
    return {"job": own} if (own := own_job()) else {}


def provenance(device: torch.device) -> dict[str, object]:
    """Where and on what an attempt runs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "event": "start",
        "time": now(),
        "host": platform.node(),
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **CODE,
        "pid": os.getpid(),
        **job(),
    }


def too_large(
    run: Run,
    sources: Mapping[str, Run],
    lookup: Lookup,
    dataset: data.Dataset,
    device: torch.device,
) -> str:
    """Why training ran out of GPU memory, in a user's words."""
    fits, batch = batch_that_fits(run, sources, lookup, dataset, device), run.recipe.factors.batch
    sizes = free_memory(device), torch.cuda.mem_get_info(device)[1]
    room, whole = (size / 2**30 for size in sizes)
    hint = f"about {fits} would fit" if fits else f"not even {max(1, batch // 4)} fit"
    return (f"batch: {batch} needs more than the {room:.0f} GiB that are free of this GPU's "
            f"{whole:.0f}; {hint}")  # fmt: skip


def work(run: Run, sources: Mapping[str, Run], folders: Mapping[str, Folder], device: str) -> int:
    """Takes one run as far as it goes; returns DONE, FAILED, BUSY or STOPPED."""
    stopping = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    folder = folders[run.id]
    before = {s: signal.signal(s, ask_to_stop) for s in STOP_SIGNALS}
    # the fork server hears none of them, nor does its child so far; Ctrl-C is the launcher's
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP_SIGNALS} - {signal.SIGINT})
    try:
        with folder.lock() as mine:
            if not mine:
                return BUSY
            if folder.complete(run, thorough=True):  # another launcher was here first
                return DONE
            reason, result = "done", DONE
            try:
                folder.create(run, {
                    "schema": SCHEMA, "id": run.id, "role": run.recipe.role, "seed": run.seed,
                    "factors": complete(run.recipe.factors, run.refs)})  # fmt: skip
                place = usable(device)
                set_up()
                if place.type == "cuda":  # streams and graphs are made on the current device
                    torch.cuda.set_device(place)
                append_line(folder.file("attempts.jsonl"), provenance(place))
                dataset = data_of(run.recipe.factors, place)
                inputs = check_inputs(run, folders.__getitem__, dataset)
                arguments = run, sources, folders.__getitem__, dataset, place, lambda: stopping
                if folder.trained is None:
                    reference.check(run.measures, dataset)
                try:
                    finished = folder.trained is not None or train(*arguments, inputs)
                except torch.OutOfMemoryError:
                    finished = None  # what it held is free once the handler is left
                if finished is None:
                    raise StudyError(too_large(*arguments[:-1]))
                if not finished or not measure(*arguments):
                    reason, result = "stopped", STOPPED
            except Exception as error:  # the run's outcome, told in its log and in the state table
                with folder.file("log.txt").open("a") as log:
                    traceback.print_exc(file=log)
                reason = str(error) if isinstance(error, StudyError) else repr(error)
                result = FAILED
            append_line(folder.file("attempts.jsonl"),
                        {"event": "end", "time": now(), "reason": reason, **job()})  # fmt: skip
            return STOPPED if stopping and result != BUSY else result
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(run: Run, sources: Mapping[str, Run], folders: Mapping[str, Folder], device: str) -> None:
    """The process's entry: everything it prints goes to the run's log.txt."""
    folders[run.id].path.mkdir(parents=True, exist_ok=True)
    with (
        folders[run.id].file("log.txt").open("a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        result = work(run, sources, folders, device)
    sys.exit(result)
