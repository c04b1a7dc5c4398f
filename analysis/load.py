"""Reads a study folder into tidy frames; the run folders are the only record.

One row per run in `Study.runs`, one per measured scalar in `Study.measures`, each with the path of
the file it was read from. A run's bill is kept three ways: its own spend; its own images
plus the images charged to it, the sum by which variants are matched; its spend with all the
sources that it stands on, each counted once. Every file is checked against the types below as it
is read. Only a missing or unreadable study.json is fatal: any other file that is missing or broken
is named in `Study.missing` or `Study.problems`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from analysis.files import AXES, SCHEMA, SPEND, Plan, Record, Trained
from analysis.pictures import picture
from analysis.recipes import computed, kind_of
from analysis.records import COLUMNS, number, renamed, spread
from study.bounded import content, decoded, inside
from study.errors import StudyError, nearest
from study.halves import foreign, mixed

FRAMES = COLUMNS | {
    "runs": ("name", "role", "cell", "seed", "id", "folder", "same_as", "state", "outcome",
             "reason", *SPEND, "charged_images", "images_total",
             *(f"{k}_with_sources" for k in SPEND), "planned_images", "side", "objective",
             "parameters", "sigma_data", "data_digest", "init_digest", "stream_digest"),
    "attempts": ("id", "code", "commit", "dirty", "device", "torch", "python", "host"),
    "missing": ("name", "cell", "seed", "id", "file", "why")}
NO_SNAPSHOT, NOT_YET = "no snapshot: not measured", "not measured yet"
UNREADABLE = "cannot be read"
UNTOLD = "no trained.json that can be read tells what it is of"


@dataclass(frozen=True)
class Study:
    """A study as found on disk: the plan (study.json) and what its run folders hold.

    The frames have the columns of FRAMES, in the order of the study file. settings: of each
    instrument's file, runs by name. missing: measurements asked for and not there. problems: one
    sentence per file that could not be used. A run's state is pending, unfinished (to measure, or
    running or interrupted, which the files cannot tell apart), failed, or done; a diverged run is
    done, with outcome "diverged".
    """

    folder: Path
    name: str
    question: str
    primaries: dict[str, dict[str, Any]]  # by cell; a cell without one has no entry
    compare: tuple[tuple[str, str], ...]  # (variant, baseline): named beside the primary
    seeds: tuple[int, ...]
    cell_names: tuple[str, ...]
    recipes: tuple[dict[str, Any], ...]
    runs: pd.DataFrame
    measures: pd.DataFrame
    score_errors: pd.DataFrame
    map_errors: pd.DataFrame
    instruments: pd.DataFrame
    settings: dict[str, dict[str, Any]]
    attempts: pd.DataFrame
    missing: pd.DataFrame
    problems: tuple[str, ...]
    strays: tuple[str, ...]  # runs whose source is no longer the one that they learned from
    halves: dict[str, str]  # what is of another training than trained.json, by folder
    files: dict[str, dict[str, list[str]]]  # folders by file of first weights and its SHA-256

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The study cell by cell, in the order of the study file."""
        return tuple(Cell(self, name) for name in self.cell_names)

    def of(self, name: str) -> Cell:
        """The cell of this name."""
        return self.cells[self.cell_names.index(name)]


class Cell:
    """What a study holds of one cell, with its recipes by name in the order of the study file.

    primary: {} without one. fixed: the names of fixed points. prefix: what a sentence about the
    cell begins with, its name where there are several.
    """

    def __init__(self, study: Study, name: str) -> None:
        def own(frame: pd.DataFrame) -> pd.DataFrame:
            return frame[frame.cell == name]

        self.study, self.name = study, name
        self.prefix = f"{name}: " if len(study.cell_names) > 1 else ""
        self.primary = study.primaries.get(name, {})
        self.recipes = {r["name"]: r for r in study.recipes if r["cell"] == name}
        self.fixed = {n for n, r in self.recipes.items() if computed(r)}
        self.runs, self.missing = own(study.runs), own(study.missing)
        self.measures, self.instruments = own(study.measures), own(study.instruments)
        self.score_errors, self.map_errors = own(study.score_errors), own(study.map_errors)

    def lasting(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows of runs that did not diverge."""
        return rows[~rows["id"].isin(self.runs[self.runs.outcome == "diverged"]["id"])]


def known(results: Path) -> list[str]:
    """Names of the studies under a results folder, sorted."""
    return sorted(p.parent.name for p in results.glob("*/study.json"))


def find(name: str, results: Path = Path("results")) -> Path:
    """The folder of a study given by name (under `results`), by path, or by its YAML file.

    Raises StudyError, saying how to start the study or listing those known, when there is none.
    """
    name = Path(name).stem if name.endswith(".yaml") else name
    for folder in (results / name, Path(name)):
        if (folder / "study.json").is_file():
            if folder.parent == results:  # what the user names by its path is the user's
                inside(folder, results)
            return folder
    if (file := Path("sweeps", f"{name}.yaml")).is_file():
        raise StudyError(f"{name}: not started: python -m study.run {file}")
    raise StudyError(f"{name}: no such study: neither {results / name} nor {name} holds a "
                     f"study.json; {nearest(Path(name).stem, known(results))}")


def load(folder: Path) -> Study:
    """Everything that a study folder holds. Raises StudyError if study.json cannot be read."""
    plan = _plan(folder / "study.json")
    problems: list[str] = []
    found: dict[str, _Run] = {}
    for entry in plan["runs"]:
        if entry["id"] not in found:
            found[entry["id"]] = _read_run(folder, entry, problems)
    recipe_of = {e["id"]: plan["recipes"][e["recipe"]] for e in plan["runs"][::-1]}
    names, settings = {i: r["name"] for i, r in recipe_of.items()}, {}
    spends = {i: _spend(run, recipe_of[i]) for i, run in found.items()}
    below = {e["id"]: {*e["refs"], *e["charged"]} for e in plan["runs"]}
    sources = {i: _closure(i, below) for i in below}
    rows: dict[str, list[tuple]] = {k: [] for k in FRAMES}
    first: dict[tuple[str, str], str] = {}
    for entry in plan["runs"]:
        recipe, run = plan["recipes"][entry["recipe"]], found[entry["id"]]
        same_as = first.setdefault((recipe["cell"], entry["id"]), recipe["name"])
        charged = math.fsum(spends.get(i, {}).get("images", math.nan) for i in entry["charged"])
        own, below_it = spends[entry["id"]], sorted(sources[entry["id"]])
        billed = [own, *(spends.get(i, {}) for i in below_it)]
        if any(kind_of(recipe_of[i]["factors"], "init") == "weights"
               for i in (entry["id"], *below_it) if i in recipe_of):
            billed.append({})  # what made the weights of a file no run folder tells
        where = (recipe["name"], recipe["cell"], entry["seed"], entry["id"])
        rows["runs"].append((
            recipe["name"], recipe["role"], recipe["cell"], entry["seed"], entry["id"],
            f"runs/{entry['folder']}", "" if same_as == recipe["name"] else same_as, run.state,
            run.trained.get("outcome", ""), run.reason, *own.values(), charged,
            own["images"] + charged,
            *(math.fsum(s.get(k, math.nan) for s in billed) for k in SPEND),
            number(recipe["factors"].get("budget", {}).get("images")), run.side,
            kind_of(recipe["factors"], "objective"),
            *(number(run.trained.get(k)) for k in ("parameters", "sigma_data")),
            *(run.trained.get(k) or "" for k in ("data_digest", "init_digest",
                                                 "stream_digest"))))
        extra = (charged, math.fsum(s.get("images", math.nan) for s in billed[1:]))
        for file, record in run.records.items():
            spread(rows, where, recipe["role"], extra, run.trained.get("data_digest"), file,
                   record, names)
            if record["settings"]["kind"] in AXES:
                settings[file] = renamed(record["settings"], names)
        rows["missing"] += [(*where, file, why) for file, why in run.missing.items()
                            if not (computed(recipe) and why == NO_SNAPSHOT)]
    strays, files = _begun(plan, found)
    rows["attempts"] = [(i, *(start.get(k) for k in FRAMES["attempts"][1:]))
                        for i, run in found.items() for start in run.starts]
    return Study(
        folder=folder, name=plan["name"], question=plan["question"],
        primaries={c: p for c, p in (plan["primary"] or {}).items() if p},
        compare=tuple((a, b) for a, b in plan.get("compare", ())),
        seeds=tuple(plan["seeds"]), cell_names=tuple(plan["cells"]),
        recipes=tuple(plan["recipes"]),
        **{k: pd.DataFrame(rows[k], columns=list(FRAMES[k])) for k in FRAMES},
        settings=settings, problems=tuple(problems), strays=tuple(strays), files=files,
        halves={e["folder"]: found[e["id"]].mixed for e in plan["runs"] if found[e["id"]].mixed})


@dataclass
class _Run:
    """One run folder, read once however many names mean it."""

    trained: dict[str, Any]
    side: str
    starts: list[dict[str, Any]]
    reason: str
    records: dict[str, dict[str, Any]]
    missing: dict[str, str]
    state: str
    mixed: str


def _spend(run: _Run, recipe: dict[str, Any]) -> dict[str, float]:
    """A run's own spend. What is computed and not trained has spent nothing."""
    if run.trained and computed(recipe):
        return dict.fromkeys(SPEND, 0.0)
    return {k: number(run.trained.get("spend", {}).get(k)) for k in SPEND}


def _begun(plan: dict[str, Any], found: dict[str, _Run]
           ) -> tuple[list[str], dict[str, dict[str, list[str]]]]:
    """Folders of runs whose recorded inputs differ from what their sources hold now; and folders
    of those that began with weights from a file, by its name and SHA-256."""
    strays: list[str] = []
    files: dict[str, dict[str, list[str]]] = {}
    for entry in {e["id"]: e for e in plan["runs"]}.values():
        for name, digest in found[entry["id"]].trained.get("inputs", {}).items():
            if name in found:
                now = found[name].trained.get("sha256", {})
                strays += [entry["folder"]] * (now.get("snapshots/1.000.pt", digest) != digest)
            elif "." in name:  # a file's name, and no run's id
                files.setdefault(name, {}).setdefault(digest, []).append(entry["folder"])
    return strays, files


def _plan(path: Path) -> dict[str, Any]:
    data = content(path)
    if data is None:
        raise StudyError(f"{path}: no such file")
    plan = decoded(data, dict, str(path))
    if plan.get("schema") != SCHEMA:
        raise StudyError(f"{path}: schema: given {plan.get('schema')!r}, allowed {SCHEMA}")
    try:
        msgspec.convert(plan, Plan)
    except msgspec.ValidationError as error:
        raise StudyError(f"{path}: {error}; run the study to have it written anew") from None
    wrong = [e["recipe"] for e in plan["runs"] if not 0 <= e["recipe"] < len(plan["recipes"])]
    if wrong:
        raise StudyError(f"{path}: runs: recipe {wrong[0]} given, of {len(plan['recipes'])}")
    names = {(r["cell"], r["name"]) for r in plan["recipes"]}
    for cell, primary in (plan["primary"] or {}).items():
        for side in ("variant", "against"):
            if primary and (cell, primary[side]) not in names:
                raise StudyError(f"{path}: primary: {cell} has no variant {primary[side]!r}")
    for name in (n for pair in plan.get("compare", ()) for n in pair):
        if name not in {n for _, n in names}:
            raise StudyError(f"{path}: compare: no variant {name!r}")
    for recipe in plan["recipes"]:
        for charge in recipe["charge"]:
            if (recipe["cell"], charge) not in names:
                raise StudyError(f"{path}: recipes: {recipe['name']} charges {charge!r}, which "
                                 f"{recipe['cell']} does not have")
    return plan


def _read_run(folder: Path, entry: dict[str, Any], problems: list[str]) -> _Run:
    relative = f"runs/{entry['folder']}"
    root = folder / relative

    def given(reader: Callable[..., Any], *arguments: object, where: str) -> Any:  # noqa: ANN401
        """What a reader gives; None where it raises a StudyError, which is then a problem."""
        try:
            return reader(*arguments, where=where)
        except StudyError as error:
            problems.append(str(error))
            return None

    def bytes_of(file: str) -> bytes | None:
        return given(content, Path(f"{root}/{file}"), where=f"{relative}/{file}")

    def read(file: str, shape: type = dict) -> dict[str, Any] | None:
        data, where = bytes_of(file), f"{relative}/{file}"
        record = None if data is None else given(decoded, data, shape, where=where)
        if record is not None and record.get("id") != entry["id"]:
            problems.append(f"{where}: belongs to id {record.get('id')!r}, "
                            f"not to {entry['id']!r}; not used")
            return None
        return record

    if not root.is_dir():
        return _Run({}, "", [], "", {}, dict.fromkeys(entry["measures"], "not started"), "pending",
                    "")
    side = str((read("run.json") or {}).get("role", ""))
    trained = read("trained.json", Trained) or {}
    attempts = bytes_of("attempts.jsonl")
    lines = [given(decoded, line, dict, where=f"{relative}/attempts.jsonl: line {i}")
             for i, line in enumerate((attempts or b"").splitlines(), start=1)]
    events = [line for line in lines if line is not None]
    reason = next((str(e.get("reason", "")) for e in reversed(events)
                   if e.get("event") in ("start", "end")), "")
    points = {f"{number(s.get('at')):.3f}" for s in trained.get("snapshots", [])}
    folder = root / "measures"
    there = {*os.listdir(folder)} & {*entry["measures"]} if folder.is_dir() else set()
    if there and not (root / "trained.json").exists():  # it vouches for weights, data and bill
        problems.append(f"{relative}/trained.json: not there; its measurements are not used")
    diverged = trained.get("outcome") == "diverged"
    records, missing = {}, {}
    for file in entry["measures"]:
        used = trained and file in there
        record = read(f"measures/{file}", Record) if used else None
        if record is not None and foreign(trained, file, record):
            problems.append(f"{relative}/measures/{file}: of other weights than the run's; "
                            "not used")
            record = None
        if record is not None:
            records[f"{relative}/measures/{file}"] = record
        elif used:
            missing[file] = UNREADABLE
        elif not trained or diverged:
            missing[file] = "diverged" if diverged else UNTOLD if file in there else "not trained"
        else:
            missing[file] = NOT_YET if file.split("-")[0] in points else NO_SNAPSHOT
    given(picture, root / "samples.png", where=f"{relative}/samples.png")
    if trained and not {UNREADABLE, NOT_YET} & {*missing.values()}:
        state = "done"
    elif reason not in ("", "done", "stopped"):
        state = "failed"
    else:
        state = "unfinished" if trained or events else "pending"
    return _Run(trained, side, [e for e in events if e.get("event") == "start"],
                str(trained.get("reason") or reason), records, missing, state,
                mixed(trained, attempts, bytes_of("steps.jsonl")) or "")


def _closure(start: str, below: dict[str, set[str]]) -> set[str]:
    """Every id reached from `start` by references or charges, itself left out, each once."""
    seen: set[str] = set()
    todo = list(below.get(start, ()))
    while todo:
        current = todo.pop()
        if current not in seen and current != start:
            seen.add(current)
            todo += below.get(current, ())
    return seen
