"""A study on Slurm: what is missing as arrays of jobs, submitted through submitit.

A job works through the runs it is given, one after the other, as a local process does. Runs at one
distance from their sources make an array, which waits for the arrays that hold these sources to
end, however they end: a source may be requeued meanwhile, and a run whose source is not there
after all leaves at once. What is submitted does not change any more: jobs import a copy of the
package and read a copy of the study file, both in results/STUDY/slurm, beside a record of each
array and a folder of its own. That folder is new: no pickle from elsewhere lies there under the
number that a job gets. Only what waits in the queue is asked of Slurm; everything else is told by
the folders of runs.

A signal (a time limit, a preemption) sets a flag; the run saves at its next step. Then submitit's
own handler requeues the job, unless Slurm has taken it away already: then that is Slurm's to do.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import shutil
import signal
import sys
import typing
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import msgspec
from rich.console import Console

from study.errors import StudyError, nearest
from study.forecast import Speeds
from study.launch import Launcher, devices
from study.layers import read_yaml
from study.pinned import GIVEN, code, pin
from study.progress import Display, label
from study.queued import FOLDER, Queue, asked, config, limit, withdraw
from study.resolve import load
from study.spec import Run
from study.store import Store, now, write_json

REQUEUES = 100  # after a time limit; a run that can't finish a step within one ends
TIME, SHARE = 240, 30.0  # minutes: a job's limit, and the work it is given
SHORTEST = 15  # minutes; submitit takes a preempted job of less than 10 or so for timed out
SLOW = 1000.0  # images a second where nothing is known: fewer runs share a job than might
MEASURE = 20.0  # seconds, the same of a measurement: an FID of 50 000 images on a fast GPU
ARRAY = 1000  # jobs of an array where Slurm does not say; its own default is 1001
OURS = ("dependency", "nodes", "ntasks_per_node", "use_srun")  # one process on one node
SAFE = "export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1"  # nothing but the copy is imported
KEPT = ("array", "chdir", "clusters", "dependency", "error", "job-name", "nodes", "ntasks",
        "ntasks-per-node", "open-mode", "output", "signal", "time")  # fmt: skip
ALIVE = ("RUNNING", "SIGNALING")  # the latter while a signal of Slurm's is on its way
MEMORY = ("mem", "mem_per_cpu", "mem_per_gpu")
JOBS = "jobs-"  # a folder of an array's payloads and logs
GPU_KEYS = ("gpus_per_node", "gpus_per_task", "num_gpus", "gres")


@dataclass(frozen=True)
class Array:
    """Jobs that are submitted together: the runs of each, and the ids of those they wait for."""

    jobs: tuple[tuple[Run, ...], ...]
    after: tuple[str, ...]


def parameters(given: Iterable[str], device: str, name: str) -> dict[str, Any]:
    """Submitit's parameters: the defaults with --slurm KEY=VALUE laid over them.

    Raises StudyError for a name that submitit does not know, a value of another type, memory
    without a unit, and a time limit that it would take for final.
    """
    from submitit.slurm import slurm

    known = typing.get_type_hints(slurm._make_sbatch_string)
    known = {k: v for k, v in known.items() if k in slurm.SlurmExecutor._valid_parameters()}
    values: dict[str, Any] = {"job_name": name, "time": TIME, "stderr_to_stdout": True}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise StudyError(f"--slurm {text}: key=value expected")
        if key in OURS:
            raise StudyError(f"--slurm {text}: a job is one process, submitted after the jobs of "
                             f"its sources; {key} is set by --on slurm")  # fmt: skip
        if key not in known:
            raise StudyError(f"--slurm {text}: submitit has no such parameter; "
                             f"{nearest(key, set(known) - set(OURS))}")  # fmt: skip
        values[key] = _typed(value, known[key], f"--slurm {text}")
    if values["time"] < SHORTEST:
        raise StudyError(f"--slurm time={values['time']}: at least {SHORTEST} minutes; submitit "
                         "would take any preemption of a shorter job for a time limit, and after "
                         "some of those it gives a job up")  # fmt: skip
    if device != "cpu" and not any(k in values for k in GPU_KEYS):
        values["gpus_per_node"] = 1
    # a cluster may requeue only what asks for it
    more = values.get("additional_parameters") or {}
    if taken := sorted(k for k in more if k.replace("_", "-") in KEPT):
        raise StudyError(f"--slurm additional_parameters: {taken[0]}: --on slurm stands on a value"
                         " of its own, or has a --slurm key for it")  # fmt: skip
    for key, value in {**more, **values}.items():
        if key.replace("-", "_") in MEMORY and str(value).strip("0").isdecimal():
            raise StudyError(f"--slurm {key}={value}: Slurm would take it for megabytes; name the "
                             f"unit, {value}G or {value}M")  # fmt: skip
    values["additional_parameters"] = {"requeue": True, **more}
    return values


def _typed(text: str, kind: Any, where: str) -> Any:  # noqa: ANN401
    """The value as YAML reads it, else as text (account=4 is text to submitit)."""
    for value in (read_yaml(text, where), text):
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            said = str(error)
    raise StudyError(f"{where}: {said}")


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
    left, where, result = {r.id: r for r in runs}, {}, []
    needs = {r.id: [i for i in r.reads if i not in trained] for r in runs}
    while left:
        free = [r for r in left.values() if not any(i in left for i in needs[r.id])]
        free = free or list(left.values())  # in a circle: the jobs will say what they lack
        alike: dict[tuple[str, ...], list[Run]] = {}
        for run in free:
            known = {i: queue.job[i].partition("_")[0] for i in needs[run.id] if i in queue.held}
            known |= {i: where[i] for i in needs[run.id] if i in where}
            after = set(known.values())
            alike.setdefault(tuple(sorted(after)), []).append(run)
        for after, group in sorted(alike.items(), key=lambda item: item[0]):
            jobs = shared(group, seconds, 60 * minutes)
            for start in range(0, len(jobs), most):
                chunk = tuple(map(tuple, jobs[start : start + most]))
                result.append(Array(chunk, after))
                where |= {r.id: f"array{len(result)}" for job in chunk for r in job}
        left = {i: r for i, r in left.items() if i not in where}
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
    store: Store, wanted: Sequence[Run], options: argparse.Namespace, console: Console
) -> None:
    """Submits what is missing of `wanted` and nobody works on; with --plan says what that is.

    Raises StudyError where something is refused; what was submitted before that stays.
    """
    values = parameters(options.slurm, options.device, store.study.name)
    queue, speeds = Queue(store.path), Speeds(store)
    skip = {"done", "running"} if options.retry else {"done", "running", "failed"}
    states = {r.id: store.folders[r.id].state(r, thorough=True) for r in wanted}
    missing = [r for r in wanted if states[r.id] not in skip
               and (options.retry or not store.blocked(r))]  # fmt: skip
    new = [r for r in missing if r.id not in queue.held]
    if not queue.known:
        console.print("squeue does not answer: what is queued already may be submitted again, and "
                      "will leave as soon as it starts", highlight=False)  # fmt: skip
    for line in queue.others if options.plan else ():  # else the summary says so
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(new)} runs to submit, {len(missing) - len(new)} queued already, "
                  f"{list(states.values()).count('running')} running", highlight=False)
    trained = {i for i, folder in store.folders.items() if folder.trained is not None}
    times = _times(store, new, trained, speeds, console)
    told = config()
    most = limit(told)
    if most is None and options.plan:
        console.print(f"Slurm does not say how long an array may be: {ARRAY} assumed")
    minutes = SHARE if options.minutes is None else options.minutes
    todo = arrays(new, times, minutes, most or ARRAY, queue, trained)
    home = _home(store.path, options)
    first = f"export PYTHONPATH={shlex.quote(str(home))}${{PYTHONPATH:+:$PYTHONPATH}}"
    values["setup"] = [*(values.get("setup") or []), SAFE, first]
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
        folder = store.folders[run.id]
        training, beside = speeds.training(run), speeds.beside(run)
        due = len(folder.due(run, thorough=True) if run.id in trained else run.measures)
        if run.id in trained:
            training = 0.0, False
        if training is None:
            training = run.recipe.factors.budget.images / SLOW, False
            assumed.add(f"{SLOW:,.0f} images a second")
        if beside is None and due:
            assumed.add(f"{MEASURE:.0f} s a measurement")
        times[run.id] = training[0] + (MEASURE * due if beside is None else beside)
    if assumed:
        console.print(f"how long runs take is not known: {' and '.join(sorted(assumed))} assumed; "
                      "python -m study.bench finds out", highlight=False)  # fmt: skip
    return times


def _home(path: Path, options: argparse.Namespace) -> Path:
    """Where the code and study file that jobs use lie; another of either, another folder."""
    asked = hashlib.sha256(repr(code()).encode() + options.study.read_bytes()).hexdigest()
    return (path / FOLDER / f"{code()['code']}-{asked[:8]}").absolute()


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
    lines = [f"{name}: {count} job{'s' * (count > 1)}"]
    lines += [line for line in text.splitlines() if line.startswith(("#SBATCH", "export"))]
    lines += values["setup"][:-2]
    for i, job in enumerate(array.jobs):
        length = sum(times[r.id] for r in job) / 60
        lines.append(f"  job {i}, about {length:.1f} minutes: {', '.join(map(label, job))}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _send(todo: list[Array], values: dict[str, Any], home: Path, cluster: str | None,
          store: Store, options: argparse.Namespace, console: Console) -> None:  # fmt: skip
    """Submits the arrays in order, a record of each in results/STUDY/slurm."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if lacking := [p for p in ("sbatch", "srun") if not shutil.which(p)]:
        raise StudyError(f"--on slurm: no {' and '.join(lacking)} here; submit from a machine of "
                         "the cluster, or see with --plan what would be submitted")  # fmt: skip
    ids: dict[str, str] = {}
    for i, array in enumerate(todo, 1):
        device = "cpu" if options.device == "cpu" else "cuda"
        asked = [[r.id for r in job] for job in array.jobs]
        given = [str(home / GIVEN / options.study.name), list(options.set),
                 str(options.results.absolute()), device, options.retry]  # fmt: skip
        columns = [[value] * len(asked) for value in given]
        after, folder = _after(array, ids), home.parent
        try:
            folder = Path(mkdtemp(prefix=JOBS, dir=home.parent))
            folder.chmod(0o755)  # others may read its logs
            executor = submitit.SlurmExecutor(folder, max_num_timeout=REQUEUES)
            executor.update_parameters(**values, **after)
            jobs = executor.map_array(Job(), *columns, asked)
            number = jobs[0].job_id.partition("_")[0]
            record = {"time": now(), "jobs": asked, "folder": folder.name, "code": code(),
                      "home": home.name, "sets": list(options.set),
                      "parameters": {**values, **after}}  # fmt: skip
            record |= {"cluster": cluster} if cluster else {}
            name = f"{cluster}-{number}" if cluster else number
            write_json(home.parent / f"{name}.json", record)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            if folder != home.parent:
                withdraw(folder)
            said = " ".join(str(error).split())
            if isinstance(error, OSError):
                said = f"{error.filename or folder}: {error.strerror}"
            raise StudyError(
                f"array {i} of {len(todo)} was not submitted: {said}; submitted before it: "
                f"{', '.join(ids.values()) or 'nothing'}; the same command submits the rest"
            ) from None
        ids[f"array{i}"] = number
        runs = sum(map(len, asked))
        console.print(f"submitted {number}: {len(asked)} job{'s' * (len(asked) > 1)}, {runs} "
                      f"run{'s' * (runs > 1)}", highlight=False)  # fmt: skip


def _state() -> str:
    """What Slurm takes this job for: COMPLETING once it is cancelled or requeued, else ALIVE."""
    from submitit import JobEnvironment

    # ARRAY_INDEX: the plain number of an array's last job means the whole array to squeue
    told = asked("squeue", "--noheader", f"--jobs={JobEnvironment().job_id}", "--format=%T")
    return (told or "unknown").strip()


class Job:
    """What a job does. submitit pickles this class's name and plain values, nothing else."""

    def __call__(self, file: str, sets: list[str], results: str, device: str, retry: bool,
                 ids: list[str]) -> None:
        """Works through the runs; at a signal saves, and has the job requeued if it is due."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is in flight yet
        print(f"python {sys.executable}, code {code()['code']}", flush=True)
        study = load(Path(file), tuple(sets))
        store = Store(Path(results), study)
        runs = [study.unique[i] for i in ids]
        launcher = Launcher(store, runs, devices(device, 1)[:1], Display(Console(), runs, set()),
                            retry)  # fmt: skip
        launcher.run(None, in_process=True)
        left = [r for r in runs if store.folders[r.id].state(r) in ("pending", "interrupted")]
        state = _state() if launcher.stopping and left else ""
        if state in ALIVE:
            signal.raise_signal(signal.SIGUSR2)  # submitit's handler, which requeues
        for run in left:
            missing = [label(study.unique[i]) for i in run.reads
                       if store.folders[i].trained is None]  # fmt: skip
            why = f"not trained: {', '.join(missing)}" if missing else f"the job is {state}"
            print(f"left: {label(run)}: {why}; unless Slurm requeues it, give the same command "
                  "again", flush=True)  # fmt: skip

    def checkpoint(self, *arguments: Any) -> Any:  # noqa: ANN401
        """What submitit requeues: the same, but what has failed meanwhile is not tried again."""
        from submitit.helpers import DelayedSubmission

        *others, _, ids = arguments
        return DelayedSubmission(self, *others, False, ids)
