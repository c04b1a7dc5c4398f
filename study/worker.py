"""One run in one process: take its lock, train what is missing, measure what is missing.

The fork server preloads this module, and with it torch; the launcher itself never imports it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from study import data, reference
from study.errors import StudyError
from study.identity import SCHEMA, complete
from study.launch import BUSY, STOP_SIGNALS, STOPPED
from study.measure import measure
from study.models import Lookup, check_inputs
from study.spec import Run
from study.store import Folder, append_line, now
from study.student import batch_that_fits
from study.subjects import Data
from study.train import set_up, train

DONE, FAILED = 0, 1


@cache
def load(kind: Data, device: torch.device, flip: bool = False) -> data.Dataset:
    """The data set on a device, loaded once per process also where it works on several runs."""
    return replace(load(kind, device), flip=True) if flip else data.load(kind).to(device)


def code() -> dict[str, object]:
    """What code this is: a digest of the package's own files, and the commit that it was run from
    where it is a git checkout."""
    own = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(f for kind in ("*.py", "*.yaml", "*.pt") for f in own.rglob(kind)):
        digest.update(file.relative_to(own).as_posix().encode() + file.read_bytes())

    def git(*words: str) -> str | None:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, text=True, capture_output=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        status = git("status", "--porcelain", "--untracked-files=no", "--", "../study")
        return {
            "code": digest.hexdigest()[:16],
            "commit": git("rev-parse", "HEAD"),
            "dirty": None if status is None else bool(status),
        }
    except FileNotFoundError:  # no git on this machine
        return {"code": digest.hexdigest()[:16], "commit": None, "dirty": None}


CODE = code()  # as imported: the files may change while a launcher lives


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
    room = torch.cuda.mem_get_info(device)[1] / 2**30
    hint = f"about {fits} would fit" if fits else f"not even {max(1, batch // 4)} fit"
    return f"batch: {batch} needs more than the {room:.0f} GiB of this GPU; {hint}"


def work(run: Run, sources: Mapping[str, Run], folders: Mapping[str, Folder], device: str) -> int:
    """Takes one run as far as it goes; returns DONE, FAILED, BUSY or STOPPED."""
    stopping = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    folder = folders[run.id]
    before = {s: signal.signal(s, ask_to_stop) for s in STOP_SIGNALS}
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
                place = torch.device(device)
                set_up()
                if place.type == "cuda":  # streams and graphs are made on the current device
                    torch.cuda.set_device(place)
                append_line(folder.file("attempts.jsonl"), provenance(place))
                factors = run.recipe.factors
                dataset = load(factors.data, place, factors.augment == "flip")
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
                        {"event": "end", "time": now(), "reason": reason})  # fmt: skip
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
