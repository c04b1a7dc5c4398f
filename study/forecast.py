"""How long runs take one worker: by what the study's own finished runs took, else as timed here.

A recipe's own seconds per image where one of its seeds is finished, otherwise the mean of its
cell's, otherwise what `study.bench` wrote into results/STUDY, one file for CPUs and one for GPUs.
Only what ran on the kind of device that is asked for counts: a CPU says nothing of a GPU.
"""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec

from study.errors import StudyError, lasting
from study.factors import Budget, Random
from study.identity import difference, digest
from study.launch import gpus
from study.meaning import updated
from study.spec import Run
from study.store import Attempt, Folder, Store, read_json, read_lines

Kind = Literal["cpu", "cuda"]
BENCH: dict[Kind, str] = {"cpu": "bench-cpu.json", "cuda": "bench-cuda.json"}  # in results/STUDY


class Timed(TypedDict):
    """What is read of a recipe's figures there."""

    step: str
    seconds_per_image: float
    first_update_seconds: float
    measuring_seconds: float | None


class Bench(TypedDict):
    """What is read of the whole."""

    device: str
    torch: str
    code: str
    recipes: dict[str, Timed]


def bench_of(store: Store, kind: Kind) -> Bench:
    """What study.bench wrote of this kind of device, or an empty one."""
    empty: Bench = {"device": "", "torch": "", "code": "", "recipes": {}}
    return read_json(store.path / BENCH[kind], Bench) or empty


def step_key(run: Run) -> str:
    """Equal for runs whose steps cost the same: what differs is only where weights and noise
    come from, and how long it goes on."""
    factors = run.recipe.factors
    plain = msgspec.structs.replace(
        factors, init=Random(), data_stream=0, budget=Budget(images=factors.batch)
    )
    return digest(difference(plain), 16)


def is_timed(run: Run) -> bool:
    """Whether the run takes steps that can be timed."""
    return updated(run.recipe.factors)


def kind_of(device: str, on_cluster: bool = False) -> Kind:
    """The kind of device that --device means, here or in a job."""
    cuda = device == "cuda" or (device == "auto" and (on_cluster or gpus() > 0))
    return "cuda" if cuda else "cpu"


def ran_on(folder: Folder) -> set[Kind]:
    """The kinds of device that a run was worked on; none where that can't be read."""
    try:
        rows = read_lines(folder.file("attempts.jsonl"), Attempt)
    except StudyError:
        return set()
    return {"cpu" if row["device"] == "cpu" else "cuda" for row in rows if "device" in row}


class Speeds:
    """What is known of how fast a study's runs are on one kind of device."""

    def __init__(self, store: Store, kind: Kind) -> None:
        self.where = "on a GPU" if kind == "cuda" else "on a CPU"
        self.finished: dict[tuple[str, ...], list[float]] = {}
        for run in store.study.unique.values():
            folder = store.folders[run.id]
            trained = folder.trained
            if trained and trained["spend"]["images"] and ran_on(folder) == {kind}:
                speed = trained["spend"]["seconds"] / trained["spend"]["images"]
                for key in ((run.recipe.cell, run.recipe.name), (run.recipe.cell,)):
                    self.finished.setdefault(key, []).append(speed)
        self.bench = bench_of(store, kind)

    def timed(self, run: Run) -> Timed | None:
        """The bench's row of the run's recipe; none where it was timed with other factors."""
        row = self.bench["recipes"].get(f"{run.recipe.cell}/{run.recipe.name}")
        return row if row and row["step"] == step_key(run) else None

    def known(self, run: Run) -> list[float] | None:
        """Seconds per image of finished runs of its recipe, else of its cell."""
        cell, name = run.recipe.cell, run.recipe.name
        return self.finished.get((cell, name)) or self.finished.get((cell,))

    def training(self, run: Run) -> float | None:
        """Seconds of training; None where nothing is known."""
        if not is_timed(run):
            return 0.0
        if known := self.known(run):
            return sum(known) / len(known) * run.images
        row = self.timed(run)
        return row and row["seconds_per_image"] * run.images

    def beside(self, run: Run) -> float | None:
        """Seconds of a first update and of measuring; None where they were not timed."""
        row = self.timed(run)
        known = row is not None and row["measuring_seconds"] is not None
        return row["first_update_seconds"] + row["measuring_seconds"] if known else None


def forecast(store: Store, new: list[Run], kind: Kind) -> str | None:
    """How long training `new` takes one worker, in words, which say of how many it is known; None
    where nothing of it is trained."""
    speeds = Speeds(store, kind)
    told = [(run, seconds) for run in new if (seconds := speeds.training(run)) is not None]
    unknown = len(new) - len(told)
    if unknown and not any(is_timed(run) for run, _ in told):
        return (f"how long training them takes {speeds.where} is not known; python -m study.bench "
                "finds out there")  # fmt: skip
    of = f"{len(told)} of these {len(new)} runs" if unknown else "them"
    new, trainings = [run for run, _ in told], [seconds for _, seconds in told]
    timed = any(is_timed(run) and not speeds.known(run) for run in new)
    beside = [speeds.beside(run) for run in new]
    finished = sum(len(s) for key, s in speeds.finished.items() if len(key) == 1)
    stands = [f"the speed of {finished} finished runs"] * bool(finished)
    stands += [f"study.bench on {speeds.bench['device']}"] * timed
    if not stands:  # nothing of it is trained
        return None
    known = [value for value in beside if value is not None]
    then = "measuring comes on top"
    if known:
        then = f"compiling and measuring {lasting(sum(known))} more"
        then += f" (not timed for {len(new) - len(known)} runs)" * (len(known) < len(new))
    then += "; of the others nothing is known, python -m study.bench finds out" * bool(unknown)
    return (f"training {of} takes about {lasting(sum(trainings))} of one worker by "
            f"{' and '.join(stands)}, {then}")  # fmt: skip
