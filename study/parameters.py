"""What --slurm KEY=VALUE asks for, as submitit's parameters; what could not work is refused.

Each key is one of submitit's, of the type that submitit gives it; its additional_parameters go to
sbatch as they are. Refused is what would be taken for something else (memory without a unit, a
time limit so short that a preemption counts as one), what --on slurm itself stands on (one process
a job, its place, logs, signal and requeueing), and jobs without a GPU for runs that need one, or
with one that they would leave idle.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from study.errors import StudyError, nearest
from study.layers import read_yaml

TIME, SHORTEST = 240, 15  # minutes: a job's limit; submitit takes a preempted job of less than 10
# or so for timed out
OURS = ("dependency", "nodes", "ntasks_per_node", "use_srun")  # one process on one node
KEPT = ("array", "chdir", "clusters", "dependency", "error", "job-name", "nodes", "ntasks",
        "no-requeue", "ntasks-per-node", "open-mode", "output", "signal", "time")  # fmt: skip
MEMORY = ("mem", "mem_per_cpu", "mem_per_gpu")
GPU_KEYS = ("gpus", "gpus_per_node", "gpus_per_socket", "gpus_per_task", "num_gpus", "gres")
FROM_1 = ("array_parallelism", "cpus_per_gpu", "cpus_per_task")
GPU_GRES = ("gpu", "shard", "mps", "none")  # none: of no kind


def parameters(given: Iterable[str], device: str, name: str) -> dict[str, Any]:
    """Submitit's parameters: the defaults with --slurm KEY=VALUE laid over them.

    Raises StudyError for a name that submitit does not know, a value of another type, memory
    without a unit, none of what a job can't do without, a time limit that it would take for final,
    no GPU for runs that need one, and one for runs on CPUs.
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
    more = values.get("additional_parameters") or {}
    if short := sorted(k for k in more if len(k) == 1):
        raise StudyError(f"--slurm additional_parameters: {short[0]}: sbatch gets --{short[0]}, "
                         "which is no option; give the option's long name")  # fmt: skip
    if taken := sorted(k for k in more if any(n.startswith(k.replace("_", "-")) for n in KEPT)):
        raise StudyError(f"--slurm additional_parameters: {taken[0]}: --on slurm stands on a value"
                         " of its own, or has a --slurm key for it")  # fmt: skip
    if unset := sorted(k for k, v in more.items() if v is False or v is None):
        raise StudyError(f"--slurm additional_parameters: {unset[0]}: sbatch would get it as "
                         f"--{unset[0]}={more[unset[0]]}; allowed: a value, or true for an option "
                         "that has none; --on slurm stands on requeueing")  # fmt: skip
    for key, value in {**more, **values}.items():
        if key.replace("-", "_") in MEMORY and str(value).strip("0").isdecimal():
            raise StudyError(f"--slurm {key}={value}: Slurm would take it for megabytes; name the "
                             f"unit, {value}G or {value}M")  # fmt: skip
        if key.replace("-", "_") in FROM_1 and isinstance(value, int) and value < 1:
            raise StudyError(f"--slurm {key}={value}: at least 1")
    _check_gpus(gpus := _gpus({**more, **values}), device)
    if device != "cpu" and not gpus:
        values["gpus_per_node"] = 1
    # a cluster may requeue only what asks for it
    values["additional_parameters"] = {"requeue": True, **more}
    return values


def remarks(values: Mapping[str, Any]) -> list[str]:
    """What parameters mean to Slurm that a user may not have meant."""
    given = {**(values.get("additional_parameters") or {}), **values}
    none = [k for k, v in given.items() if k.replace("-", "_") in ("mem", "mem_per_cpu")
            and not str(v).upper().strip("0KMGTB")]  # fmt: skip
    return [f"{key}={given[key]} asks for all memory of a node: one job at a time runs on each"
            for key in none]  # fmt: skip


def _gpus(values: Mapping[str, Any]) -> dict[str, str]:
    """Of the values, those that say how many GPUs there shall be."""
    said = {key: ",".join(part for part in str(value).lower().split(",")
                          if key != "gres" or part.startswith(GPU_GRES))
            for key, value in values.items() if key.replace("-", "_") in GPU_KEYS}  # fmt: skip
    return {key: text for key, text in said.items() if text}


def _check_gpus(said: Mapping[str, str], device: str) -> None:
    """Raises StudyError where there shall be none for runs that need one, and for the reverse."""
    some = {key: any(part.rpartition(":")[2] not in ("0", "none") for part in text.split(","))
            for key, text in said.items()}  # fmt: skip
    for key, text in said.items():
        if device != "cpu" and not any(some.values()):
            raise StudyError(f"--slurm {key}={text}: its jobs would find no GPU; runs on CPUs "
                             "want --device cpu")  # fmt: skip
        if device == "cpu" and some[key]:
            raise StudyError(f"--slurm {key}={text}: with --device cpu its jobs would leave that "
                             "idle; leave out one of them")  # fmt: skip


def _typed(text: str, kind: Any, where: str) -> Any:  # noqa: ANN401
    """The value as YAML reads it, else as text (account=4 is text to submitit)."""
    for value in (read_yaml(text, where), text):
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            said = str(error)
    said += "; minutes, a whole number of them" * where.startswith("--slurm time=")
    raise StudyError(f"{where}: {said}")
