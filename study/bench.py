"""How fast a study trains and is measured on this machine, and what that makes of its length.

Every step that the study's recipes take is timed as training takes it, data on the device,
optimiser and averages included: medians over steps after a warm-up. TFLOP/s are the student's
forward pass's multiply-adds, counted twice by torch's own counter, times the passes of one image
(a backward pass is two forwards; a teacher is taken to be of the student's size); the ceiling is
this device's best square matrix product in the same precision, or in float32 if that is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from study import worker
from study.capture import usable
from study.errors import StudyError, command, lasting
from study.forecast import BENCH, Kind, bench_of, is_timed, kind_of, step_key
from study.launch import devices
from study.resolve import load
from study.run import chosen, fetch_data
from study.sharing import sharing
from study.spec import Run, Study
from study.store import Store, write_json
from study.timing import Site, ceiling, determinism, measure_key, steps_of, timed, together
from study.train import set_up

EXAMPLES = """examples:
  python -m study.bench sweeps/grid.yaml                  each variant's speed, and the study's length
  python -m study.bench sweeps/grid.yaml --workers 16     and how much sixteen at once do together
  python -m study.bench sweeps/cifar10.yaml --only 'ct-*-s0' --device cuda --set base.batch=128
"""  # noqa: E501


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "python -m study.bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("study", type=Path, help="a study file, e.g. sweeps/grid.yaml")
    p.add_argument("--only", action="append", default=[], metavar="PATTERN",
                   help="only runs VARIANT-CELL-sSEED that match, and their sources")  # fmt: skip
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--steps", type=int, default=30, metavar="N", help="updates timed (30)")
    p.add_argument("--workers", type=int, default=1, metavar="N",
                   help="also time N processes training at once")  # fmt: skip
    p.add_argument("--steps-only", action="store_true",
                   help="leave out measurements and the cost of determinism")  # fmt: skip
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR",
                   help="DIR/STUDY/bench-cpu.json or bench-cuda.json keeps the figures for "
                        "study.run --plan")  # fmt: skip
    p.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE",
                   help="override a key of the study file")  # fmt: skip
    return p


def forecast(study: Study, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of one worker for the whole study: training, first updates, measurements."""
    total = {"training": 0.0, "first updates": 0.0, "measurements": 0.0}
    for run in study.unique.values():
        row = rows.get(step_key(run))
        if row is None:
            continue
        total["training"] += row["seconds_per_image"] * run.recipe.factors.budget.images
        total["first updates"] += row["first_update_seconds"]
        total["measurements"] += measuring(run, row) or 0
    return total


def measuring(run: Run, row: Mapping[str, Any]) -> float | None:
    """Seconds to make all that is asked of a run; None where some of it was not timed."""
    known, asked = row["measures"], [measure_key(m) for m in run.measures]
    return sum(known[key] for key in asked) if known.keys() >= set(asked) else None


def table(rows: Mapping[str, Mapping[str, Any]], ceilings: Mapping[str, float]) -> Table:
    """The figures as people read them; rows by the name of a run that takes the step."""
    shown = Table(title="one update", title_justify="left")
    for column in ("step of", "parameters", "batch", "precision", "ms", "images/s", "TFLOP/s",
                   "of ceiling", "peak MiB", "first update s", "measures s"):  # fmt: skip
        shown.add_column(column, justify="left" if column == "step of" else "right")
    for name, row in rows.items():
        speed = row["flops_per_image"] / row["seconds_per_image"]
        share = speed / ceilings[row["precision"]]
        shown.add_row(
            name, f"{row['parameters']:,}", f"{row['batch']}", row["precision"],
            f"{1000 * row['seconds_per_image'] * row['batch']:.3g}",
            f"{1 / row['seconds_per_image']:,.0f}", f"{speed / 1e12:.3g}", f"{100 * share:.0f} %",
            f"{row['peak_mebibytes']:,.0f}", f"{row['first_update_seconds']:.1f}",
            f"{sum(row['measures'].values()):.1f}" if row["measures"] else "-")  # fmt: skip
    return shown


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)  # a log has room for the table
    problems = Console(stderr=True)
    try:
        for name in ("steps", "workers"):
            if not 1 <= getattr(options, name) <= 100_000:
                raise StudyError(f"--{name} {getattr(options, name)}: a number from 1 expected")
        study = load(options.study, tuple(options.set))
        device = usable(devices(options.device, 1)[0])
        store = Store(options.results, study)
        fetch_data(study)
        bench(study, store, options, device, console)
    except StudyError as error:
        problems.print(f"error: {error}", style="red", highlight=False, markup=False,
                       soft_wrap=True)  # fmt: skip
        return 2
    return 0


def bench(
    study: Study, store: Store, options: argparse.Namespace, device: torch.device, console: Console
) -> None:
    """Times everything, prints it, and keeps it for --plan, each figure as soon as it is there."""
    runs = steps_of(chosen(study, options.only))
    if not runs:
        raise StudyError(f"{options.study}: nothing here is trained")
    set_up()
    say = partial(console.print, highlight=False, markup=False)
    kind = kind_of(device.type)
    where = torch.cuda.get_device_name(device) if kind == "cuda" else "one CPU thread"
    precisions = sorted({r.recipe.factors.precision for r in runs.values()})
    ceilings = {precision: ceiling(device, precision) for precision in precisions}
    for precision, flops in ceilings.items():
        say(f"ceiling of {where} in {precision}: {flops / 1e12:.3g} TFLOP/s")
    rows: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {
        "device": where,
        "torch": torch.__version__,
        "code": worker.CODE["code"],
        "ceilings": ceilings,
        "steps": {},
        "recipes": kept(store, where, kind),
    }

    def keep() -> None:
        store.path.mkdir(parents=True, exist_ok=True)
        write_json(store.path / BENCH[kind], result)

    with TemporaryDirectory() as folder:
        here = Site(study, device, Path(folder))
        for key, run in track(list(runs.items()), "timing", console=console):
            name = f"{run.recipe.name}-{run.recipe.cell}"
            try:
                row = rows[key] = timed(here, run, options.steps, not options.steps_only)
            except torch.OutOfMemoryError:
                why = worker.too_large(run, here.all, here.folders.__getitem__, here.dataset(run),
                                       device)  # fmt: skip
                say(f"{name}: {why}")
                continue
            say(f"{name}: {1000 * row['seconds_per_image'] * row['batch']:.3g} ms, "
                f"the first update {row['first_update_seconds']:.1f} s")  # fmt: skip
            result["steps"][name] = row
            result["recipes"] |= recipes(study, rows)
            keep()
        if not rows:
            raise StudyError(f"{options.study}: no step fits into this GPU's memory")
        console.print(table(result["steps"], ceilings))
        if not options.steps_only:
            first = next(run for key, run in runs.items() if key in rows)
            try:
                ratio, spread = determinism(here, first, options.steps)
            except torch.OutOfMemoryError:
                say("determinism: kernels chosen by speed alone do not fit into memory")
            else:
                say(f"determinism: a step of {first.recipe.name} takes {ratio:.2f} times what it "
                    "takes with kernels chosen by speed alone (two timings of one step differ by "
                    f"up to {100 * spread:.0f} %)")  # fmt: skip
                result["determinism"] = {
                    "of": first.recipe.name, "ratio": ratio, "spread": spread}  # fmt: skip
                keep()
    if options.workers > 1:
        result["together"] = {}
        # around all of it: the fork server outlives a call and keeps the environment it began with
        with sharing([str(device)] * options.workers, say):
            for run in (run for key, run in runs.items() if key in rows):
                one, all_ = (together(study, run, str(device), n) for n in (1, options.workers))
                ratio = all_ / one
                name = f"{run.recipe.name}-{run.recipe.cell}"
                result["together"][name] = {"workers": options.workers, "ratio": ratio}
                say(f"{options.workers} of {name} at once: {ratio:.2f} times the images of one "
                    "alone")  # fmt: skip
                keep()
    total = result["forecast_seconds"] = forecast(study, rows)
    parts = ", ".join(f"{name} {lasting(value)}" for name, value in total.items() if value)
    steps = [r for r in study.unique.values() if is_timed(r)]
    missing = sum(step_key(r) not in rows for r in steps)
    left_out = f"; {missing} of {len(steps)} runs not timed" if missing else ""
    there = [r for r in steps if step_key(r) in rows]
    unmeasured = sum(measuring(r, rows[step_key(r)]) is None for r in there)
    left_out += f"; measurements of {unmeasured} runs not timed" if unmeasured else ""
    say(f"the whole study on one worker: {lasting(sum(total.values()))} "
        f"({parts}{left_out})")  # fmt: skip
    keep()


def kept(store: Store, device: str, kind: Kind) -> dict[str, dict[str, Any]]:
    """What an earlier bench on this device, by this torch and code, found of other recipes."""
    old, here = bench_of(store, kind), (device, torch.__version__, worker.CODE["code"])
    return old["recipes"] if (old["device"], old["torch"], old["code"]) == here else {}


def recipes(study: Study, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What --plan reads, by cell/name. step: digest of what was timed."""
    result = {}
    for run in study.unique.values():
        if (row := rows.get(step_key(run))) is not None:
            result[f"{run.recipe.cell}/{run.recipe.name}"] = {
                "step": step_key(run),
                "seconds_per_image": row["seconds_per_image"],
                "first_update_seconds": row["first_update_seconds"],
                "measuring_seconds": measuring(run, row),
            }
    return result


if __name__ == "__main__":
    command(main)
