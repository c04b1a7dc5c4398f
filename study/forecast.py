"""How long runs take one worker: by what the study's own finished runs took, else as timed here.

A recipe's own seconds per image where one of its seeds is finished, otherwise the mean of its
cell's, otherwise what `study.bench` wrote into results/STUDY/bench.json.
"""

from __future__ import annotations

from study.spec import Run
from study.store import Store, read_json

BENCH = "bench.json"  # in results/STUDY: what study.bench found


class Speeds:
    """What is known of how fast a study's runs are."""

    def __init__(self, store: Store) -> None:
        self.finished: dict[tuple[str, ...], list[float]] = {}
        for run in store.study.unique.values():
            if (trained := store.folders[run.id].trained) and trained["spend"]["images"]:
                speed = trained["spend"]["seconds"] / trained["spend"]["images"]
                for key in ((run.recipe.cell, run.recipe.name), (run.recipe.cell,)):
                    self.finished.setdefault(key, []).append(speed)
        self.bench = read_json(store.path / BENCH) or {"recipes": {}}

    def timed(self, run: Run) -> dict[str, float] | None:
        """The bench's row of the run's recipe."""
        return self.bench["recipes"].get(f"{run.recipe.cell}/{run.recipe.name}")

    def training(self, run: Run) -> tuple[float, bool] | None:
        """Seconds of training and whether the bench was asked; None where nothing is known."""
        cell, name = run.recipe.cell, run.recipe.name
        images = run.recipe.factors.budget.images
        if known := self.finished.get((cell, name)) or self.finished.get((cell,)):
            return sum(known) / len(known) * images, False
        row = self.timed(run)
        return None if row is None else (row["seconds_per_image"] * images, True)

    def beside(self, run: Run) -> float:
        """Seconds of a first update and of measuring; 0 where they were not timed."""
        row = self.timed(run)
        return row["seconds_beside"] if row else 0.0


def forecast(store: Store, new: list[Run]) -> str | None:
    """How long training `new` takes one worker, in words; None where nothing is known of one."""
    speeds = Speeds(store)
    trainings = [speeds.training(run) for run in new]
    if not all(trainings):
        return None
    seconds, timed = (sum(column) for column in zip(*trainings, strict=True))
    beside = sum(map(speeds.beside, new))
    finished = sum(len(s) for key, s in speeds.finished.items() if len(key) == 1)
    stands = [f"the speed of {finished} finished runs"] * bool(finished)
    stands += [f"study.bench on {speeds.bench.get('device')}"] * bool(timed)
    then = f"measuring them {beside / 60:.1f}" if beside else "measuring comes on top"
    return (f"training them takes about {seconds / 60:.1f} minutes of one worker by "
            f"{' and '.join(stands)}, {then}")  # fmt: skip
