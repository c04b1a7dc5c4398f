"""From a study file to a Study: layers merged, references followed; every mistake a StudyError."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from study.checks import check_measure, check_primary, check_recipe
from study.errors import StudyError, nearest
from study.factors import Budget, Factors
from study.identity import run_id
from study.layers import Layered, mapping, overlap, overlay, read_file, read_yaml
from study.limits import MOST_ABOVE, check_measurements, check_runs
from study.meaning import references, simplest
from study.metrics import Measure
from study.places import check_places
from study.settings import Settings, score_settings, settings_of
from study.spec import SECTIONS, Primary, Recipe, Run, Study, check_rounding, compared, meant

PRESETS = Path(__file__).with_name("presets.yaml")
KEYS = tuple("question primary compare base sources variants cells seeds measure".split())
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def load(path: Path, sets: tuple[str, ...] = ()) -> Study:
    """Reads and resolves a study file; sets: `key.path=value` laid over it.

    Raises StudyError for anything that a user has to mend in it.
    """
    file = str(path)
    if not NAME.fullmatch(path.stem):
        raise StudyError(f"{file}: a study's name has letters, digits, '.', '_' and '-' only")
    tree = read_file(path)
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise StudyError(f"--set {text}: key.path=value expected")
        overlay(tree, key.split("."), read_yaml(value, f"--set {text}"), f"--set {text}")
    return Resolver(file, tree, path.stem).study()


class Resolver:
    """One study file on its way to a Study."""

    def __init__(self, file: str, tree: dict, name: str) -> None:
        self.file, self.name = file, name
        for key in tree:
            if key not in KEYS:
                raise StudyError(f"{file}: {key}: no such key; {meant(key, KEYS)}")
        self.tree = tree
        self.base = self._section("base")
        self.groups = {key: self._named(key) for key in SECTIONS.values()}
        self.sources, self.variants = self.groups["sources"], self.groups["variants"]
        self.cells = self._named("cells") or {self.name: {}}
        self.presets = read_file(PRESETS)
        if not self.variants:
            raise StudyError(f"{file}: variants: missing or empty; a study compares variants")
        if both := set(self.sources) & set(self.variants):
            raise StudyError(f"{file}: sources.{min(both)}: also the name of a variant")
        self.seeds = self._seeds(tree.get("seeds", [0]), "seeds")
        self.ids: dict[tuple[str, str, int], str] = {}

    def _section(self, key: str) -> dict:
        return mapping(self.tree.get(key), f"{self.file}: {key}")

    def _named(self, key: str) -> dict[str, dict]:
        section = {} if self.tree.get(key) is None else self.tree[key]
        if not isinstance(section, dict):
            raise StudyError(f"{self.file}: {key}: {section!r} given, a mapping of names expected")
        for name in section:  # names, so their dots are not paths
            if not NAME.fullmatch(name):
                raise StudyError(
                    f"{self.file}: {key}.{name}: a name has letters, digits, '.', "
                    "'_' and '-', 64 at most"
                )
        return {n: mapping(v, f"{self.file}: {key}.{n}") for n, v in section.items()}

    def study(self) -> Study:
        """Resolves everything; runs come in an order in which sources precede their users."""
        many = len(self.cells) * (len(self.sources) + len(self.variants))
        check_runs(many, self.seeds, self.file)
        table: dict[tuple[str, str], Recipe] = {}
        for cell, (role, key) in product(self.cells, SECTIONS.items()):
            for name in self.groups[key]:  # sources first: variants are charged with them
                table[name, cell] = self._recipe(name, role, cell, table)
        recipes = list(table.values())
        check_measurements(recipes, self.file)
        sources = {c: {name: table[name, c] for name in self.sources} for c in self.cells}
        for recipe in recipes:
            check_recipe(recipe, self._where(recipe), sources[recipe.cell], self.variants)
        check_places(recipes, self._where)
        check_rounding(recipes, self.file)
        ordered = {cell: tuple(self._order(cell, table)) for cell in self.cells}
        runs, asked = [], set()
        for chain in ordered.values():  # block after block: a study cut short has whole ones
            asks = [(r, tuple(settings_of(r.measure, r.factors, r.role))) for r in chain]
            for seed in self.seeds:
                for recipe, measures in asks:
                    if seed in recipe.seeds:
                        runs.append(self._run(recipe, seed, measures, asked))
        question = self.tree.get("question", "")
        if not isinstance(question, str):
            raise StudyError(f"{self.file}: question: {question!r} given; text expected")
        return Study(
            self.name,
            question,
            self._primaries(table),
            self.seeds,
            tuple(r for chain in ordered.values() for r in chain),
            tuple(runs),
            compared(self.tree.get("compare"), f"{self.file}: compare", recipes),
        )

    def _seeds(self, seeds: object, where: str) -> tuple[int, ...]:
        kind = Annotated[tuple[Annotated[int, Meta(ge=0, lt=2**31)], ...], Meta(min_length=1)]
        try:
            seeds = msgspec.convert(seeds, kind)
        except msgspec.ValidationError as error:
            raise StudyError(
                f"{self.file}: {where}: {seeds!r:.200} given; a list of different whole "
                f"numbers from 0 expected ({error})"
            ) from None
        if len(set(seeds)) < len(seeds):
            raise StudyError(f"{self.file}: {where}: {list(seeds)} names one twice")
        return seeds

    # --- one recipe ---

    def _chain(self, key: str, name: str, seen: tuple[str, ...] = ()) -> list[tuple[str, dict]]:
        """The layers of a variant or source, `from` first: (where it stands, its own keys)."""
        where, own = f"{key}.{name}", dict(self.groups[key][name])
        if where in seen:
            raise StudyError(f"{self.file}: {where}.from: a cycle: {' -> '.join((*seen, where))}")
        if len(seen) > MOST_ABOVE:
            raise StudyError(f"{self.file}: {where}.from: the last of over {MOST_ABOVE} in a row")
        origin = own.pop("from", None)
        if origin is None:
            return [(where, own)]
        if not isinstance(origin, str):
            raise StudyError(f"{self.file}: {where}.from: {origin!r} given; one name expected")
        preset = origin.removeprefix("preset:")
        if above := next((k for k, group in self.groups.items() if origin in group), None):
            below = self._chain(above, origin, (*seen, where))
        elif preset in self.presets:
            below = [(f"preset {preset}", mapping(self.presets[preset], f"preset {preset}"))]
        else:
            names = [*self.variants, *self.sources, *(f"preset:{p}" for p in self.presets)]
            raise StudyError(f"{self.file}: {where}.from: {origin!r}; {nearest(origin, names)}")
        return [*below, (where, own)]

    def _recipe(
        self, name: str, role: str, cell: str, table: Mapping[tuple[str, str], Recipe]
    ) -> Recipe:
        key = SECTIONS[role]
        cell_keys = {k: v for k, v in self.cells[cell].items() if k not in ("measure", "primary")}
        layered = Layered(Factors, self.file)
        layered.add(self.base, "base")
        fixed = layered.add(cell_keys, f"cells.{cell}")
        charge: object = ()
        seeds = self.seeds
        for where, own in self._chain(key, name):
            charge = own.pop("charge", charge) or ()
            if "seeds" in own:
                given = self._seeds(own.pop("seeds"), f"{where}.seeds")
                seeds = tuple(s for s in self.seeds if s in given)
                if not seeds:
                    raise StudyError(
                        f"{self.file}: {where}.seeds: {list(given)} has none of the study's "
                        f"{list(self.seeds)}"
                    )
            for path in layered.add(own, where):
                if role == "student" and any(overlap(path, f) for f in fixed):
                    raise StudyError(
                        f"{self.file}: {where}.{path}: cell {cell!r} sets this key, so "
                        "no variant may; only sources override a cell"
                    )
        place = f"{self.file}: {key}.{name}.charge"
        if role == "teacher" and charge:
            raise StudyError(f"{place}: only variants pay for sources")
        if not (
            isinstance(charge, list | tuple)
            and all(isinstance(c, str) and c in self.sources for c in charge)
            and len(set(charge)) == len(charge)
        ):
            raise StudyError(
                f"{place}: {charge!r}; a list of different sources expected "
                f"({nearest('', self.sources)})"
            )
        charged = [table[c, cell].factors.budget.images for c in charge]
        factors = self._budgeted(simplest(layered.build()), layered, charged, place)
        asked = self._layered(Measure, "measure", cell)
        measure = asked.build()
        check_measure(measure, factors, asked.where)
        return Recipe(name, role, cell, factors, tuple(charge), seeds, measure)

    def _budgeted(
        self, factors: Factors, layered: Layered, charged: Sequence[int], where: str
    ) -> Factors:
        """budget.share resolved against the base budget, less the images of charged sources."""
        budget = factors.budget
        if budget.images is None:
            raise StudyError(f"{layered.where('budget')}: needs 'images', in base or here")
        images = budget.images * (1 if budget.share is None else budget.share)
        if abs(images - round(images)) > 1e-6 or round(images) % factors.batch:
            raise StudyError(
                f"{layered.where('budget')}: {images:g} images are not whole batches "
                f"of {factors.batch}"
            )
        sigma = factors.sigma
        if sigma.min >= sigma.max:
            raise StudyError(
                f"{layered.where('sigma')}: min {sigma.min} is not below max {sigma.max}"
            )
        left = round(images) - sum(charged)
        if charged and (left <= 0 or left % factors.batch):
            raise StudyError(
                f"{where}: {sum(charged)} of {round(images)} images are charged; what is left "
                f"must be a positive number of whole batches of {factors.batch}"
            )
        return msgspec.structs.replace(factors, budget=Budget(images=left))

    def _layered(self, kind: type, key: str, cell: str) -> Layered:
        """A section of the file with the cell's own laid over it."""
        layered, where = Layered(kind, self.file), f"cells.{cell}.{key}"
        layered.add(self._section(key), key)
        layered.add(mapping(self.cells[cell].get(key), f"{self.file}: {where}"), where)
        return layered

    def _where(self, recipe: Recipe) -> str:
        return f"{self.file}: {recipe.place}"

    # --- what holds between recipes ---

    def _order(self, cell: str, table: Mapping[tuple[str, str], Recipe]) -> Iterator[Recipe]:
        """Sources before their users, otherwise in the file's order. Raises on a cycle."""
        done: dict[str, int] = {}  # with how many stand above each, one above the other

        def visit(name: str, above: tuple[str, ...]) -> Iterator[Recipe]:
            if name in above:
                raise StudyError(
                    f"{self.file}: sources.{name}: a cycle: {' -> '.join((*above, name))}"
                )
            if name in done:
                return
            recipe = table[name, cell]
            consulted = [n for m in settings_of(recipe.measure, recipe.factors, recipe.role)
                         for n in m.consults]  # fmt: skip
            others = (*references(recipe.factors).values(), *recipe.charge, *consulted)
            for other in others:
                if lacking := set(recipe.seeds) - set(table[other, cell].seeds):
                    raise StudyError(
                        f"{self._where(table[other, cell])}.seeds: without {min(lacking)}, with "
                        f"which {name!r} needs it"
                    )
                yield from visit(other, (*above, name))
            done[name] = 1 + max((done[other] for other in others), default=0)
            if max(done[name], len(above)) > MOST_ABOVE:
                raise StudyError(f"{self._where(recipe)}: over {MOST_ABOVE} sources in a row")
            yield recipe

        for name in (*self.sources, *self.variants):
            yield from visit(name, ())

    def _run(
        self,
        recipe: Recipe,
        seed: int,
        measures: tuple[Settings, ...],
        asked: set[tuple[str, str]],
    ) -> Run:
        """The run, with its id. asked: score errors that an earlier run measures already."""
        ids = {f: self.ids[n, recipe.cell, seed] for f, n in references(recipe.factors).items()}
        name = run_id(recipe.factors, ids, recipe.role, seed)
        self.ids[recipe.name, recipe.cell, seed] = name
        measures = tuple(
            m.resolved({n: self.ids[n, recipe.cell, seed] for n in m.consults}) for m in measures
        )
        score = score_settings(recipe.measure, recipe.factors, ids)
        if score and recipe.role == "student" and (recipe.cell, score.file) not in asked:
            asked.add((recipe.cell, score.file))
            measures += (score,)
        charged = tuple(self.ids[c, recipe.cell, seed] for c in recipe.charge)
        return Run(recipe, seed, name, ids, charged, measures)

    def _primaries(self, table: Mapping[tuple[str, str], Recipe]) -> dict[str, Primary]:
        """The primary comparison of each cell, checked against what is measured there."""
        result = {}
        for cell in self.cells:
            layered = self._layered(Primary, "primary", cell)
            if not layered.values:
                continue
            primary = layered.build()
            for key in ("variant", "against"):
                if getattr(primary, key) not in self.variants:
                    raise StudyError(
                        f"{layered.where(key)}: no variant {getattr(primary, key)!r}; "
                        f"{nearest(getattr(primary, key), self.variants)}"
                    )
            recipe, other = table[primary.variant, cell], table[primary.against, cell]
            if not set(recipe.seeds) & set(other.seeds):
                raise StudyError(
                    f"{layered.where('against')}: {other.name} has seeds {list(other.seeds)} and "
                    f"{recipe.name} {list(recipe.seeds)}; a comparison needs some that both have"
                )
            if primary.ema is None:
                primary = msgspec.structs.replace(primary, ema=recipe.factors.weights_ema[0])
            for side in (recipe, other):
                check_primary(primary, side, layered.where)
            result[cell] = primary
        return result
