"""Runs a study: trains and measures what is missing, and says where the report goes.

The command that starts a study resumes, extends and repairs it. Exit status: 0 all done; 1 a run
failed, or waits for a source that did; 2 the study file or the command has to be mended; 3 work is
left.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import TypedDict

from rich.console import Console

from study.domains import check_extractors
from study.errors import StudyError, nearest, printable
from study.launch import Launcher, devices
from study.places import present, weights_file
from study.progress import Display, label, state_table
from study.resolve import load
from study.spec import Run, Study
from study.store import Store, read_json
from study.subjects import Cifar10, FashionMnist, Images

BENCH = "bench.json"  # in results/STUDY: what study.bench found


class Timed(TypedDict):
    """What is read of a recipe's figures there."""

    seconds_per_image: float
    seconds_beside: float


class Bench(TypedDict):
    """What is read of the whole."""

    device: str
    recipes: dict[str, Timed]


EXAMPLES = """examples:
  python -m study.run sweeps/grid.yaml                    train and measure what is missing
  python -m study.run sweeps/grid.yaml --plan             say what that would be, and do nothing
  python -m study.run sweeps/grid.yaml --status           what is done, running, failed
  python -m study.run sweeps/grid.yaml --only 'cd*-s0'    these runs and the sources they need
  python -m study.run sweeps/grid.yaml --set seeds='[0,1,2,3,4,5]'   more seeds: only they are new
  python analysis/report.py grid                          the report:
  results/grid/report/report.html
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m study.run",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("study", type=Path, help="a study file, e.g. sweeps/grid.yaml")
    p.add_argument("--plan", action="store_true", help="say what would be done; do nothing")
    p.add_argument("--status", action="store_true", help="say what is done; do nothing")
    p.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes at once (default: CPU cores, or GPUs); 0: in this process",
    )
    p.add_argument("--minutes", type=float, metavar="M", help="stop cleanly after M minutes")
    p.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only runs VARIANT-CELL-sSEED that match (* and ?), and their sources; "
        "given again, those as well",
    )
    p.add_argument("--retry", action="store_true", help="try failed runs again")
    p.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where results/STUDY goes (default: results)",
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override a key of the study file, paths from its root; repeatable",
    )
    return p


def chosen(study: Study, patterns: list[str]) -> list[Run]:
    """The runs that match any pattern, and those they need, in the study's order."""
    if not patterns:
        return list(study.unique.values())
    named = []
    for pattern in patterns:
        here = [r.id for r in study.runs if any(fnmatch(n, pattern) for n in (label(r), r.folder))]
        if not here:
            names = {r.recipe.name for r in study.runs}
            hint = (
                f"did you mean '{pattern}-*'?"
                if pattern in names
                else nearest(pattern, [label(r) for r in study.runs])
            )
            raise StudyError(f"--only {pattern}: no run matches; {hint}")
        named += here
    wanted: set[str] = set()
    while named:
        run = study.unique[named.pop()]
        wanted.add(run.id)
        named += [i for i in (*run.reads, *run.charged) if i not in wanted]
    return [r for r in study.unique.values() if r.id in wanted]


def fetch_data(study: Study) -> None:
    """Finds or downloads files that the data need, once, before any process asks for them."""
    for data in {r.recipe.factors.data for r in study.runs}:
        data = getattr(data, "of", data)  # a fitted mixture reads the images it is fitted to
        if isinstance(data, FashionMnist):
            from study import fashion_mnist  # numpy, which --plan and --status do without

            fashion_mnist.load(None if data.root is None else Path(data.root))
        elif isinstance(data, Cifar10):
            from study import cifar10

            cifar10.load(None if data.root is None else Path(data.root))
        elif isinstance(data, Images):
            from study import folder

            images = folder.load(Path(data.root), data.held_out)["train"][0]
            image = images.shape[3], images.shape[1]  # known only now, unlike other data's
            for recipe in study.recipes:
                if recipe.factors.data == data:
                    where = f"{study.name}: cell {recipe.cell}: measure.{{}}".format
                    check_extractors(recipe.measure, image, data.root, where)


def check_weights(store: Store, wanted: list[Run], thorough: bool) -> None:
    """The files that runs to be trained begin with are there; thorough: and are what they say."""
    untrained = [r for r in wanted if store.folders[r.id].trained is None]
    for path in {p for r in untrained if (p := weights_file(r.recipe.factors))}:
        present(path)
        if thorough:
            from study import interop  # torch, which --plan and --status do without

            interop.read(path)


def forecast(store: Store, new: list[Run]) -> str | None:
    """How long training `new` takes one worker, in words.

    By a recipe's own seconds per image where one of its seeds is finished, otherwise by the mean
    of its cell's, otherwise as `study.bench` timed it here; None where nothing is known of one.
    """
    speeds: dict[tuple[str, ...], list[float]] = {}
    for run in store.study.unique.values():
        if (trained := store.folders[run.id].trained) and trained["spend"]["images"]:
            speed = trained["spend"]["seconds"] / trained["spend"]["images"]
            for key in ((run.recipe.cell, run.recipe.name), (run.recipe.cell,)):
                speeds.setdefault(key, []).append(speed)
    bench = read_json(store.path / BENCH, Bench) or {"device": "", "recipes": {}}
    seconds = beside = 0.0
    timed = 0
    for run in new:
        cell, name = run.recipe.cell, run.recipe.name
        row = bench["recipes"].get(f"{cell}/{name}")
        if known := speeds.get((cell, name)) or speeds.get((cell,)):
            speed = sum(known) / len(known)
        elif row:
            speed, timed = row["seconds_per_image"], timed + 1
        else:
            return None
        seconds += speed * run.recipe.factors.budget.images
        beside += row["seconds_beside"] if row else 0.0
    finished = sum(len(s) for key, s in speeds.items() if len(key) == 1)
    stands = [f"the speed of {finished} finished runs"] * bool(finished)
    stands += [f"study.bench on {bench.get('device')}"] * bool(timed)
    then = (
        f"measuring them {beside / 60:.1f} more" if beside else "measuring comes on top"
    )
    return (f"training them takes about {seconds / 60:.1f} minutes of one worker by "
            f"{' and '.join(stands)}, {then}")  # fmt: skip


def show_plan(console: Console, store: Store, wanted: list[Run]) -> None:
    """What is new, kept and no longer asked for."""
    states = store.states()
    kept = [r for r in wanted if store.folders[r.id].trained is not None]
    names = {r.id for r in kept}
    new = [r for r in wanted if r.id not in names]
    due = sum(len(store.folders[r.id].due(r)) for r in kept) + sum(len(r.measures) for r in new)
    console.print(state_table(store.study, states))
    console.print(
        f"{len(new)} runs to train ({sum(r.recipe.factors.budget.images for r in new):,} "
        f"images), {len(kept)} kept, {due} measurements to make, "
        f"{len(store.orphans)} folders that this study does not ask for",
        highlight=False,
    )
    if new and (expected := forecast(store, new)):
        console.print(printable(expected), highlight=False, markup=False)
    for path in store.orphans:
        console.print(f"  not asked for: {printable(str(path))}", highlight=False, markup=False)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parser().parse_args(arguments)
    console, problems = Console(), Console(stderr=True)
    try:
        for name in ("workers", "minutes"):
            value = getattr(options, name)
            if value is not None and not 0 <= value < 1e6:
                raise StudyError(f"--{name} {value}: a number from 0 expected")
        study = load(options.study, tuple(options.set))
        store, wanted = Store(options.results, study), chosen(study, options.only)
        if options.plan:
            check_weights(store, wanted, thorough=False)
            show_plan(console, store, wanted)
            return 0
        if not options.status:
            slots = devices(options.device, options.workers)
            fetch_data(study)
            check_weights(store, wanted, thorough=True)
            store.write_study(options.study)
            done = {i for i, s in store.states(thorough=True).items() if s == "done"}
            display = Display(console, wanted, done)
            deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
            Launcher(store, wanted, slots, display, options.retry).run(
                deadline, options.workers == 0
            )
        return summary(console, store, wanted)
    except StudyError as error:
        problems.print(
            f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        return 2


def summary(console: Console, store: Store, wanted: list[Run]) -> int:
    """The state table, failures with reason and log, the next command; returns the exit status."""
    states = store.states()
    console.print(state_table(store.study, states))
    blocked = {r.id: w for r in wanted if states[r.id] == "pending" and (w := store.blocked(r))}
    counts = Counter("blocked" if r.id in blocked else states[r.id] for r in wanted)
    console.print(", ".join(f"{n} {state}" for state, n in counts.items()), highlight=False)
    for run in wanted:
        folder = store.folders[run.id]
        if states[run.id] == "failed":
            console.print(
                f"failed: {label(run)}: {printable(folder.reason())}\n"
                f"  log: {folder.file('log.txt')}\n"
                "  --retry tries it again",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        elif (folder.trained or {}).get("outcome") == "diverged":
            why = printable(str(folder.trained["reason"]))
            console.print(f"diverged: {label(run)}: {why}", highlight=False, markup=False)
        elif run.id in blocked:
            why = printable(blocked[run.id])
            console.print(f"blocked: {label(run)}: {why}", highlight=False, markup=False)
    console.print(
        f"report: python analysis/report.py {store.path}  ->  "
        f"{store.path / 'report' / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )
    if counts["interrupted"] + counts["pending"]:
        console.print("work is left: the same command goes on from here", highlight=False)
    if counts["failed"] or blocked:
        return 1
    return 0 if counts["done"] == len(wanted) else 3


if __name__ == "__main__":
    sys.exit(main())
