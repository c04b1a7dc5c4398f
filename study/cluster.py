"""A study on Slurm: what is missing as arrays of jobs, submitted through submitit.

A job (study.jobs) works through the runs it is given, as a local process does. Runs at one
distance from their sources make an array, which waits for the arrays that hold these sources to
end, however they end: a source may be requeued meanwhile, and a run whose source is not there
after all leaves at once. What is submitted does not change any more: jobs import a copy of the
package and nothing else of that name (study.sealed), and read a copy of the study file, both in
results/STUDY/slurm, beside a record of each array and a folder of its own. That folder is new: no
pickle from elsewhere lies there under the number that a job gets. Only what waits in the queue is
asked of Slurm; everything else is told by the folders of runs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import shlex
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rich.console import Console

from study import sealed
from study.errors import StudyError, lasting, several
from study.forecast import Speeds, kind_of
from study.jobs import Job
from study.parameters import remarks
from study.pinned import GIVEN, OWN, code, pin
from study.progress import label, say
from study.queued import (
    FOLDER,
    SILENT,
    Queue,
    config,
    limit,
    plain,
    set_for_sbatch,
    withdraw,
)
from study.spec import Run
from study.store import Store, now, write_json

REQUEUES = 100  # after a time limit; a run that can't finish a step within one ends
SHARE = 30.0  # minutes of work that a job is given
SLOW = 1000.0  # images a second where nothing is known: fewer runs share a job than might
MEASURE = 20.0  # seconds, the same of a measurement: an FID of 50 000 images on a fast GPU
ARRAY = 1000  # jobs of an array where Slurm does not say; its own default is 1001
SAFE = "export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1"  # nothing but the copy is imported
SEALED = "study/sealed.py"  # in the copy: what a job starts with
JOBS = "jobs-"  # a folder of an array's payloads and logs


@dataclass(frozen=True)
class Array:
    """Jobs that are submitted together: the runs of each, and the ids of those they wait for."""

    jobs: tuple[tuple[Run, ...], ...]
    after: tuple[str, ...]


def arrays(
    runs: Sequence[Run],
    seconds: dict[str, float],
    minutes: float,
    most: int,
    queue: Queue,
    trained: Collection[str],
) -> list[Array]:
    """The arrays that make `runs`, sources that are not trained first; `after` holds earlier ones
    as 'array1', and the ids of arrays that are queued already."""
    left, result = {r.id: r for r in runs}, []
    where = {i: queue.job[i].partition("_")[0] for i in queue.held}  # the array that makes a run
    needs = {r.id: [i for i in r.reads if i not in trained] for r in runs}
    while left:
        free = [r for r in left.values() if not any(i in left for i in needs[r.id])]
        free = free or list(left.values())  # in a circle: the jobs will say what they lack
        alike: dict[tuple[str, ...], list[Run]] = {}
        for run in free:
            del left[run.id]
            after = {where[i] for i in needs[run.id] if i in where}
            alike.setdefault(tuple(sorted(after)), []).append(run)
        for after, group in sorted(alike.items(), key=lambda item: item[0]):
            jobs = shared(group, seconds, 60 * minutes)
            for start in range(0, len(jobs), most):
                chunk = tuple(map(tuple, jobs[start : start + most]))
                result.append(Array(chunk, after))
                where |= {r.id: f"array{len(result)}" for job in chunk for r in job}
    return result


def shared(runs: Iterable[Run], seconds: dict[str, float], most: float) -> list[list[Run]]:
    """The runs in order, together in a job as far as they fit into `most` seconds."""
    jobs: list[list[Run]] = []
    room = 0.0
    for run in runs:
        if not jobs or seconds[run.id] > room:
            jobs, room = [*jobs, []], most
        jobs[-1].append(run)
        room -= seconds[run.id]
    return jobs


def submit(
    store: Store,
    wanted: Sequence[Run],
    values: dict[str, Any],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Submits what is missing of `wanted` and nobody works on; with --plan says what that is.

    values: the parameters that --slurm gives. Raises StudyError where something is refused; what
    was submitted before that stays.
    """
    queue, speeds = Queue(store.path), Speeds(store, kind_of(options.device, on_cluster=True))
    skip = {"done", "running"} if options.retry else {"done", "running", "failed"}
    states = store.states(wanted, thorough=True)
    missing = [r for r in wanted if states[r.id] not in skip
               and not store.blocked(r, options.retry)]  # fmt: skip
    new = [r for r in missing if not queue.due(r.id, store.folders[r.id], states[r.id])]
    if left_out := set_for_sbatch():
        say(Console(stderr=True), f"{', '.join(left_out)} of the environment left out: --slurm "
            "alone says what jobs ask for")  # fmt: skip
    if not queue.known:
        say(console, f"{SILENT}: what is queued already may be submitted again, and will leave as "
            "soon as it starts")  # fmt: skip
    if options.plan:  # else the summary says so
        say(console, *queue.others)
    say(console, f"{several(len(new), 'run')} to submit, {len(missing) - len(new)} queued "
        f"already, {list(states.values()).count('running')} running")  # fmt: skip
    tried = {r.id: "pending" for r in new if states[r.id] != "failed"}
    say(console, *queue.lines(tried, {r.id: label(r) for r in new}))  # why it was not made before
    trained = {i for i, folder in store.folders.items() if folder.trained is not None}
    times = _times(store, new, trained, speeds, console)
    told = config()
    most = limit(told)
    if most is None and options.plan:
        say(console, f"Slurm does not say how long an array may be: {ARRAY} assumed")
    minutes = SHARE if options.minutes is None else options.minutes
    todo = arrays(new, times, minutes, most or ARRAY, queue, trained)
    home = _home(store.path, options)
    first = f"export PYTHONPATH={shlex.quote(str(home))}${{PYTHONPATH:+:$PYTHONPATH}}"
    values["setup"] = [*(values.get("setup") or []), SAFE, first, _whole(home)]
    say(console, *remarks(values))
    if options.plan:
        for i, array in enumerate(todo, 1):
            _show(console, f"array{i}", array, values, times, store)
        return
    if not new:
        return
    pin(home, options.study)
    _send(todo, values, home, told.get("ClusterName"), store, options, console)


def _times(store: Store, runs: Sequence[Run], trained: Collection[str], speeds: Speeds,
           console: Console) -> dict[str, float]:  # fmt: skip
    """Seconds of each run's work; says what of it had to be assumed."""
    times, assumed = {}, set()
    for run in runs:
        due, training, beside = run.measures, speeds.training(run), speeds.beside(run)
        if run.id in trained:
            due, training = store.folders[run.id].due(run, thorough=True), 0.0
        if training is None:
            training = run.images / SLOW
            assumed.add(f"{SLOW:,.0f} images a second")
        if beside is None and due:
            assumed.add(f"{MEASURE:.0f} s a measurement")
        times[run.id] = training + (MEASURE * len(due) if beside is None else beside)
    if assumed:
        said = " and ".join(sorted(assumed))
        say(console, f"how long runs take is not known: {said} assumed; "
            f"python -m study.bench finds out {speeds.where}")  # fmt: skip
    return times


def _home(path: Path, options: argparse.Namespace) -> Path:
    """Where the code and study file that jobs use lie; another of either, another folder."""
    asked = hashlib.sha256(repr(code()).encode() + options.study.read_bytes()).hexdigest()
    return (path / FOLDER / f"{code()['code']}-{asked[:8]}").absolute()


def _whole(home: Path) -> str:
    """The batch script's own look at the file that looks at all others: Python would run an empty
    one, as a full disk leaves it, without a word."""
    whole = hashlib.sha256((OWN.parent / SEALED).read_bytes()).hexdigest()
    lost = shlex.quote(f"error: {home}: the copy of the code that this job was given is gone or "
                       f"damaged; {sealed.AGAIN}")  # fmt: skip
    return (f'test "$(sha256sum < {shlex.quote(str(home / SEALED))})" = "{whole}  -" '
            f"|| {{ echo {lost}; exit 1; }}")  # fmt: skip


def _after(array: Array, ids: dict[str, str]) -> dict[str, str]:
    """The dependency: afterany, since a job may fail or be cancelled when its runs are done."""
    after = ":".join(ids.get(a, a) for a in array.after)
    return {"dependency": f"afterany:{after}"} if after else {}


def _show(console: Console, name: str, array: Array, values: dict[str, Any],
          times: dict[str, float], store: Store) -> None:  # fmt: skip
    """One array as sbatch would be given it, and its jobs."""
    from submitit.slurm import slurm

    count = len(array.jobs)
    text = slurm._make_sbatch_string(
        command="", folder=(store.path / FOLDER / f"{JOBS}XXXXXXXX").absolute(), **values,
        **_after(array, {}),
        map_count=count if count > 1 else None)  # fmt: skip
    lines = [f"{name}: {several(count, 'job')}"]
    lines += [line for line in text.splitlines() if line.startswith("#SBATCH")] + values["setup"]
    for i, job in enumerate(array.jobs):
        length = lasting(sum(times[r.id] for r in job))
        lines.append(f"  job {i}, about {length}: {', '.join(map(label, job))}")
    say(console, *lines)


def _send(todo: list[Array], values: dict[str, Any], home: Path, cluster: str | None,
          store: Store, options: argparse.Namespace, console: Console) -> None:  # fmt: skip
    """Submits the arrays in order, a record of each in results/STUDY/slurm."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if lacking := [p for p in ("sbatch", "srun") if not shutil.which(p)]:
        raise StudyError(f"--on slurm: no {' and '.join(lacking)} here; submit from a machine of "
                         "the cluster, or see with --plan what would be submitted")  # fmt: skip
    start = [sys.executable, "-u", str(home / SEALED), sealed.digest(home)]
    ids: dict[str, str] = {}
    for i, array in enumerate(todo, 1):
        device = kind_of(options.device, on_cluster=True)
        asked = [[r.id for r in job] for job in array.jobs]
        given = [str(home / GIVEN / options.study.name), list(options.set),
                 str(options.results.absolute()), device, options.retry]  # fmt: skip
        columns = [[value] * len(asked) for value in given]
        after, folder = _after(array, ids), home.parent
        try:
            folder = Path(mkdtemp(prefix=JOBS, dir=home.parent))
            folder.chmod(0o755)  # others may read its logs
            executor = submitit.SlurmExecutor(folder, REQUEUES, python=shlex.join(start))
            executor.update_parameters(**values, **after)
            with plain(), contextlib.redirect_stderr(io.StringIO()):  # sbatch's words come below
                jobs = executor.map_array(Job(), *columns, asked)
            number = jobs[0].job_id.partition("_")[0]
            record = {"time": now(), "jobs": asked, "folder": folder.name, "code": code(),
                      "home": home.name, "sets": list(options.set), "retry": options.retry,
                      "parameters": {**values, **after}}  # fmt: skip
            record |= {"cluster": cluster} if cluster else {}
            name = f"{cluster}-{number}" if cluster else number
            write_json(home.parent / f"{name}.json", record)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            if folder != home.parent:
                withdraw(folder)
            said = "; ".join(line.strip() for line in str(error).splitlines())
            if device == "cuda" and "gres" in said:
                said += " (a job asks for a GPU unless --device cpu is given)"
            if isinstance(error, OSError):
                said = f"{error.filename or folder}: {error.strerror}"
            raise StudyError(
                f"array {i} of {len(todo)} was not submitted: {said}; submitted before it: "
                f"{', '.join(ids.values()) or 'nothing'}"
                f"{', and the same command leaves that alone' if ids else ''}"
            ) from None
        ids[f"array{i}"] = number
        say(console, f"submitted {number}: {several(len(asked), 'job')}, "
            f"{several(sum(map(len, asked)), 'run')}")  # fmt: skip
