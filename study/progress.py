"""Live progress: a bar per active run and one for the study; plain lines where there is no
terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from study.errors import printable
from study.spec import Run, Study
from study.store import LEFT, Folder, Store

COLOURS = {
    "done": "green",
    "diverged": "magenta",
    "running": "cyan",
    "queued": "blue",
    "failed": "red",
    "blocked": "red",
    "interrupted": "yellow",
    "to measure": "yellow",
    "pending": "dim",
}

MANY_SEEDS = 12


def label(run: Run) -> str:
    """variant-cell-sSEED, as in the folder's name, without the id."""
    return run.folder.rpartition("-")[0]


def say(console: Console, *lines: str) -> None:
    """Prints lines as they are: codes for a terminal written out, nothing taken for markup, and
    none folded, so that a path can be copied."""
    for line in lines:
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def reason(folder: Folder, outcome: str) -> str:
    """Why a run failed, and where its log is, or why it diverged; nothing of others."""
    if outcome == "failed":
        return f"{folder.reason()}\n  log: {folder.file('log.txt')}"
    return str(folder.trained["reason"]) if outcome == "diverged" else ""


class Display:
    """What the launcher shows while it works. Progress is counted in training images."""

    def __init__(self, console: Console, runs: list[Run], done: set[str],
                 folders: Mapping[str, Folder]) -> None:  # fmt: skip
        self.console, self.live, self.folders = console, console.is_terminal, folders
        self.bars = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.count, self.runs = len(done), len(runs)
        completed = sum(r.images for r in runs if r.id in done)
        total = sum(r.images for r in runs)
        self.study = self.bars.add_task("study", total=total, completed=completed, note="")
        self.tasks: dict[str, TaskID] = {}
        self.start: dict[str, float] = {}

    def __enter__(self) -> None:
        self.bars.start()

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def started(self, run: Run) -> None:
        """A process has taken the run."""
        self.start[run.id] = time.monotonic()
        self.tasks[run.id] = self.bars.add_task(label(run), total=run.images, note="starting")
        if not self.live:
            say(self.console, f"start  {label(run)}")

    def progress(self, run: Run, row: Mapping | None) -> None:
        """The run's last log row."""
        task = self.bars.tasks[self.bars.task_ids.index(self.tasks[run.id])]
        if row and row["images"] > task.completed:
            self.bars.advance(self.study, row["images"] - task.completed)
            note = "measuring" if row["images"] >= run.images else f"loss {row['loss']:.3g}"
            self.bars.update(task.id, completed=row["images"], note=note)

    def ended(self, run: Run, state: str | None) -> None:
        """The run's process is gone; state None means another launcher has the run."""
        self.bars.remove_task(self.tasks.pop(run.id))
        self.count += state == "done"
        if self.live or not state:
            return
        seconds, folder = time.monotonic() - self.start[run.id], self.folders[run.id]
        state = "diverged" if folder.outcome == "diverged" else state
        why = reason(folder, state)
        say(self.console, f"{state:<6} {label(run)}  {seconds:.1f} s  "
                          f"[{self.count} of {self.runs} runs]" + f"\n  {why}" * bool(why))


def outcomes(store: Store, states: Mapping[str, str], retry: bool = False) -> dict[str, str]:
    """The states in a user's words: of what is done, diverged; of what is left, blocked where a
    source diverged or failed (unless that is tried again)."""
    result = dict(states)
    for i, state in states.items():
        if state == "done" and store.folders[i].outcome == "diverged":
            result[i] = "diverged"
        elif state in LEFT and store.blocked(store.study.unique[i], retry):
            result[i] = "blocked"
    return result


def state_table(study: Study, states: Mapping[str, str]) -> Table:
    """Variants and sources by seed, with each run's state; many seeds are counted by state."""
    by_recipe: dict[int, dict[int, str]] = {}
    for run in study.runs:
        by_recipe.setdefault(id(run.recipe), {})[run.seed] = states[run.id]
    few = len(study.seeds) <= MANY_SEEDS
    columns = [f"seed {s}" for s in study.seeds] if few else [f"{len(study.seeds)} seeds"]
    table = Table(title=study.name, title_justify="left")
    for column in ("cell", "run", *columns):
        table.add_column(column)
    for recipe in study.recipes:
        found = by_recipe[id(recipe)]
        counts = Counter(found.values()).items()
        each = [found.get(s, "") for s in study.seeds]  # a recipe may have fewer than the study
        cells = each if few else [", ".join(f"{n} {state}" for state, n in counts)]
        role = "" if recipe.role == "student" else " (source)"
        coloured = (f"[{COLOURS.get(c, 'default')}]{c}[/]" for c in cells)
        table.add_row(recipe.cell, recipe.name + role, *coloured)
    return table
