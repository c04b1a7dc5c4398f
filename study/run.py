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
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from study.cluster import submit
from study.domains import check_counts, check_extractors, shape_of
from study.errors import StudyError, nearest, several
from study.extractors.names import is_inception
from study.forecast import Kind, forecast, kind_of
from study.halves import check_whole
from study.launch import Launcher, devices
from study.parameters import parameters
from study.places import lacking, present, weights_file
from study.progress import label, outcomes, reason, say, state_table
from study.queued import Queue
from study.resolve import load
from study.spec import Run, Study
from study.standing import check_blocks, digest, unlike
from study.store import LEFT, Store, sha256
from study.subjects import Cifar10, Data, FashionMnist, Images

EXAMPLES = """examples:
  python -m study.run sweeps/grid.yaml                    train and measure what is missing
  python -m study.run sweeps/grid.yaml --plan             say what that would be, and do nothing
  python -m study.run sweeps/grid.yaml --status           what is done, running, failed
  python -m study.run sweeps/grid.yaml --only 'cd*-s0'    these runs and the sources they need
  python -m study.run sweeps/grid.yaml --on slurm --slurm partition=gpu --plan   as jobs
  python -m study.run sweeps/grid.yaml --set seeds='[0,1,2,3,4,5]'   more seeds: only they are new
  python -m analysis.report grid                          the report:
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
    p.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="stop cleanly after M minutes; on Slurm: short runs share jobs of M minutes (30)",
    )
    p.add_argument("--on", choices=("slurm",), help="submit what is missing, and return")
    p.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of submitit's for Slurm: partition, time (minutes), mem, account, ...; "
        "repeatable",
    )
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


class Found(NamedTuple):
    """Data in files, as they are now: their digest, and the shape of one image."""

    digest: str
    shape: tuple[int, ...]


def fetch_data(study: Study) -> dict[Data, Found]:
    """Finds or downloads files that data and extractors need, once, before any process asks for
    them. Returns what is found of the data, which may change."""
    result: dict[Data, Found] = {}
    for data in {r.recipe.factors.data for r in study.runs}:
        data = getattr(data, "of", data)  # a fitted mixture reads the images it is fitted to
        if not isinstance(data, FashionMnist | Cifar10 | Images):
            continue
        from study import folder
        from study.extractors import splits  # numpy, which --status does without

        root = None if data.root is None else Path(data.root)
        if isinstance(data, FashionMnist):
            found = splits.of_fashion_mnist(root)
        elif isinstance(data, Cifar10):
            found = splits.of_cifar10(root)
        else:
            found = folder.load(root, data.held_out)
        parts = {k: found[k][0] for k in ("train", "held_out")}
        parts = {k: v[..., None] if v.ndim == 3 else v for k, v in parts.items()}
        parts = {k: v.transpose(0, 3, 1, 2) for k, v in parts.items()}
        shape = parts["train"].shape[1:]
        result[data] = Found(digest(*parts.values()), shape)
        if isinstance(data, Images):  # what is known only now, unlike other data's
            image, counts = shape[:2], {k: len(v) for k, v in parts.items()}
            for recipe in study.recipes:
                if recipe.factors.data == data:
                    where = f"{study.name}: cell {recipe.cell}: measure.{{}}".format
                    check_extractors(recipe.measure, image, data.root, where)
                    check_counts(recipe.measure, counts, data.root, where)
    asked = {(m.record.get("extractor", ""), m.weights): (r.recipe.cell, m.record["kind"])
             for r in study.runs for m in r.measures}  # fmt: skip
    for (identity, weights), (cell, kind) in asked.items():
        if is_inception(identity):
            from study.extractors import inception

            try:
                inception.load(identity, weights)
            except StudyError as error:
                where = f"{study.name}: cell {cell}: measure.{kind}"
                raise StudyError(f"{where}: {error}") from None
    return result


def check_weights(
    store: Store, wanted: list[Run], found: Mapping[Data, Found] | None = None
) -> None:
    """The files that runs to be trained begin with are there, and are those that others of the
    study began with; found, of the data: and are what they say, and fit the runs' networks."""
    users: dict[Path, list[Run]] = {}
    for run in store.study.unique.values():
        if path := weights_file(run.recipe.factors):
            users.setdefault(path, []).append(run)
    unfit: dict[str, dict[str, None]] = {}  # places by what is wrong there
    for path, runs in users.items():
        names = dict.fromkeys(r.recipe.place for r in runs)
        where = f"{store.study.name}: {', '.join(names)}"
        begun = all(store.folders[r.id].trained for r in runs if r in wanted)
        if begun and not path.exists():
            continue  # nothing begins with it any more
        try:
            now = sha256(present(path))
        except StudyError as error:
            raise StudyError(f"{where}: {error}") from None
        for run in runs:  # also of runs that are not wanted now: they are compared with these
            trained = store.folders[run.id].trained
            if trained and trained["inputs"].get(path.name, now) != now:
                raise StudyError(
                    f"init.weights: {path}: not the file that {label(run)} began with; bring that "
                    "one back, or give this one another name"
                )
        if found is not None and not begun:
            from study import interop, models  # torch, which --plan and --status do without

            try:
                weights = interop.read(path)
            except StudyError as error:
                raise StudyError(f"{where}: init.weights: {error}") from None
            for run in (r for r in runs if r in wanted and not store.folders[r.id].trained):
                factors, data = run.recipe.factors, run.recipe.factors.data
                shape = found[data].shape if data in found else shape_of(data)
                try:
                    models.check_fit(weights, factors, shape)
                except StudyError as error:
                    unfit.setdefault(str(error), {})[run.recipe.place] = None
    if unfit:
        told = (f"{store.study.name}: {', '.join(places)}: init.weights: {error}"
                for error, places in unfit.items())  # fmt: skip
        raise StudyError("\n".join(told))


def show_plan(console: Console, store: Store, wanted: list[Run], kind: Kind, retry: bool) -> None:
    """What is new, kept, left out and no longer asked for; kind: of the device that it is for."""
    states = outcomes(store, store.states(), retry)
    left = {}
    for run in wanted:
        if states[run.id] == "failed" and not retry:
            left[run.id] = f"{label(run)} left out: failed; --retry tries it again"
        elif states[run.id] in ("blocked", "failed") and (why := store.blocked(run, retry)):
            left[run.id] = f"{label(run)} left out: {why}"
    names = {r.id for r in wanted if store.folders[r.id].trained is not None}
    kept = [r for r in wanted if r.id in names]
    new = [r for r in wanted if r.id not in names | left.keys()]
    due = sum(len(store.folders[r.id].due(r)) for r in kept if r.id not in left)
    due += sum(len(r.measures) for r in new)
    console.print(state_table(store.study, states))
    say(
        console,
        f"{several(len(new), 'run')} to train "
        f"({sum(r.images for r in new):,} images), {len(kept)} kept, "
        f"{several(due, 'measurement')} to make, "
        f"{several(len(store.orphans), 'folder')} that this study does not ask for"
        + f"; left out: {several(len(left), 'run')}" * bool(left),
        *(f"  {why}" for why in left.values()),
        *unlike(store),
    )
    data = dict.fromkeys(r.recipe.factors.data for r in store.study.runs)
    say(console, *(f"data: {what}" for what in dict.fromkeys(map(lacking, data)) if what))
    if new and (expected := forecast(store, new, kind)):
        say(console, expected)
    say(console, *(f"  not asked for: {path}" for path in store.orphans))


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parser().parse_args(arguments)
    # a log has room for names
    console, problems = Console(width=None if sys.stdout.isatty() else 150), Console(stderr=True)
    try:
        for name in ("workers", "minutes"):
            value = getattr(options, name)
            if value is not None and not 0 <= value < 1e6:
                raise StudyError(f"--{name} {value}: a number from 0 expected")
        if options.minutes == 0 and not options.on:
            raise StudyError(
                "--minutes 0: a number above 0 expected; with --on slurm 0 means one run per job"
            )
        if options.slurm and not options.on:
            raise StudyError(f"--slurm {options.slurm[0]}: only with --on slurm")
        if options.on and options.workers is not None:
            raise StudyError("--workers: a job works on one run at a time; not with --on slurm")
        study = load(options.study, tuple(options.set))
        asked = parameters(options.slurm, options.device, study.name) if options.on else {}
        store, wanted = Store(options.results, study), chosen(study, options.only)
        check_whole({f.path: f.trained for f in store.folders.values()})
        if options.plan:
            check_weights(store, wanted)
            show_plan(console, store, wanted, kind_of(options.device, bool(options.on)),
                      options.retry)  # fmt: skip
            if options.on:
                submit(store, wanted, asked, options, console)
            return 0
        slots = [] if options.status or options.on else devices(options.device, options.workers)
        if not options.status:
            found = fetch_data(study)
            check_weights(store, wanted, found)
            digests = {data: at.digest for data, at in found.items()}
            told = check_blocks(store, wanted, digests, options.retry)
            store.write_study(options.study)
            say(console, *unlike(store, digests), *told)  # before anything is spent
        if options.on and not options.status:
            submit(store, wanted, asked, options, console)
        elif slots:
            deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
            launcher = Launcher(store, wanted, slots, console, options.retry)
            launcher.run(deadline, options.workers == 0)
        return summary(console, store, wanted)
    except StudyError as error:
        problems.print(
            f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        return 2


def summary(console: Console, store: Store, wanted: list[Run]) -> int:
    """The state table, failures with reason and log, the next command; returns the exit status."""
    states, queue = store.states(), Queue(store.path)
    states |= {i: "queued" for i, s in states.items() if queue.due(i, store.folders[i], s)}
    told = outcomes(store, states)
    console.print(state_table(store.study, told))
    counts = Counter(told[r.id] for r in wanted)
    say(console, ", ".join(f"{n} {state}" for state, n in counts.items()))
    for run in wanted:
        state = told[run.id]
        why = store.blocked(run) if state == "blocked" else reason(store.folders[run.id], state)
        if why:
            again = "\n  --retry tries it again" * (state == "failed")
            say(console, f"{state}: {label(run)}: {why}{again}")
    names = {r.id: label(r) for r in store.study.unique.values()}
    say(console, *unlike(store), *queue.notes, *queue.lines(states, names))
    say(console, f"report: python -m analysis.report {store.path}  ->  "
                 f"{store.path / 'report' / 'report.html'}")  # fmt: skip
    if any(counts[state] for state in LEFT):
        say(console, "work is left: the same command goes on from here")
    if counts["failed"] or counts["blocked"]:
        return 1
    return 0 if counts["done"] + counts["diverged"] == len(wanted) else 3


if __name__ == "__main__":
    sys.exit(main())
