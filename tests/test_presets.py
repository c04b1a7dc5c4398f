"""Presets against the constants of the papers they cite, whatever base they stand on."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from studies import TWO_MODES, read, replaced

from study import worker
from study.factors import (
    L2,
    Consistency,
    Continuous,
    Doubling,
    EctMapping,
    Ema,
    Euler,
    Factors,
    Fixed,
    FromRun,
    Heun,
    InverseStep,
    KSample,
    L2Norm,
    LognormalGrid,
    Progressive,
    PseudoHuber,
    RAdam,
    Random,
    SingleSample,
    Stopgrad,
    Teacher,
    Uniform,
    UniformGrid,
)
from study.layers import read_file
from study.resolve import PRESETS
from study.spec import Study
from study.store import Store, read_lines

EDM, RATE = FromRun(run="edm"), RAdam(lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
PLAIN = {"objective": Consistency(), "target": Stopgrad(), "solver": Euler()}
CM = {"law": UniformGrid(), "weighting": Uniform(), "distance": L2(), "dropout": 0.0,
      "optimizer": RAdam(lr=4e-4, betas=(0.9, 0.999), eps=1e-8)}  # fmt: skip
ECT = PLAIN | {
    "score": SingleSample(),
    "init": EDM,
    "discretization": EctMapping(q=2, k=8, b=1, stages=8),
    "law": LognormalGrid(P_mean=-1.1, P_std=2.0),
    "weighting": InverseStep(),
    "distance": L2Norm(),
    "dropout": 0.2,
    "optimizer": RATE,
}
SCM = {
    "objective": Continuous(warm_up=10_000 / 400_000, c=0.1),
    "init": EDM,
    "law": LognormalGrid(P_mean=-1.0, P_std=1.4),
    "optimizer": RAdam(lr=1e-4, betas=(0.9, 0.99), eps=1e-8),
}
PUBLISHED = {
    "ct": PLAIN | {"score": SingleSample(), "init": Random()},
    "cd": PLAIN | {"score": Teacher(run="edm"), "init": Random()},
    "cm_cd": PLAIN | CM | {
        "score": Teacher(run="edm"),
        "init": EDM,
        "solver": Heun(),
        "discretization": Fixed(N=18),
    },
    "cm_ct": PLAIN | CM | {
        "score": SingleSample(),
        "init": Random(),
        "target": Ema(mu=0.9, s0=2),
        "discretization": Progressive(s0=2, s1=150),
    },
    "ict": PLAIN | {
        "score": SingleSample(),
        "init": Random(),
        "discretization": Doubling(s0=10, s1=1280),
        "law": LognormalGrid(P_mean=-1.1, P_std=2.0),
        "weighting": InverseStep(),
        "distance": PseudoHuber(c0=0.00054),
        "dropout": 0.3,
        "optimizer": RATE,
    },
    "ect": ECT,
    "stf_ct": ECT | {"score": KSample(n=256, shared=True)},
    "sct": SCM | {"score": SingleSample(), "dropout": 0.2},
    "scd": SCM | {"score": Teacher(run="edm"), "dropout": 0.0},
}  # fmt: skip

# a base that differs from every preset in every number that some preset states
OTHER = """\
  objective: {kind: continuous, warm_up: 0.5, c: 7}
  score: {kind: k_sample, n: 7}
  target: {kind: ema, mu: 0.5, s0: 3}
  discretization: {kind: ect, q: 3, k: 4, b: 5, stages: 6}
  law: {kind: lognormal_grid, P_mean: 0.5, P_std: 0.7}
  weighting: edm
  distance: {kind: pseudo_huber, c0: 0.3}
  dropout: 0.45
  repeat: 2
  optimizer: {kind: radam, lr: 0.5, betas: [0.1, 0.2]}
  weights_ema: [0.2]
"""


def methods(base: str, folder: Path) -> Study:
    """A study of every preset on its base."""
    variants = "".join(f"  {name}: {{from: 'preset:{name}'}}\n" for name in PUBLISHED)
    text = replaced("  ct: {score: single_sample}\n", "")
    text = text.replace("  cd: {score: {kind: teacher, run: edm}}\n", variants)
    text = text.replace("  discretization: {kind: fixed, N: 10}\n", base)
    assert len(text) > len(TWO_MODES)
    return read(folder, text, ("seeds=[0]",))


def factors(study: Study) -> dict[str, Factors]:
    return {r.recipe.name: r.recipe.factors for r in study.runs if r.recipe.role == "student"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_method_on_any_base_and_leaves_the_rest_to_it(
    name: str, tmp_path: Path
) -> None:
    stated = PUBLISHED[name]
    assert set(read_file(PRESETS)[name]) == set(stated)
    for base in ("", OTHER):
        (tmp_path / str(len(base))).mkdir()
        study = methods(base, tmp_path / str(len(base)))
        found = factors(study)[name]
        assert {key: getattr(found, key) for key in stated} == stated
    assert (found.batch, found.budget.images, found.weights_ema) == (64, 1280, (0.2,))
    if "discretization" not in stated:
        assert found.discretization == EctMapping(q=3, k=4, b=5, stages=6)


def test_every_preset_is_checked_here() -> None:
    assert set(read_file(PRESETS)) == set(PUBLISHED)


def test_each_pair_differs_in_what_it_is_there_for(tmp_path: Path) -> None:
    found = factors(methods("", tmp_path))
    for one, other, differs in [
        ("ct", "cd", {"score"}),
        ("ect", "stf_ct", {"score"}),
        ("sct", "scd", {"score", "dropout"}),
        ("cm_ct", "cm_cd", {"score", "init", "target", "solver", "discretization"}),
    ]:
        a, b = (msgspec.structs.asdict(found[name]) for name in (one, other))
        assert {key for key in a if a[key] != b[key]} == differs


def test_every_preset_trains(tmp_path: Path) -> None:
    study = methods("", tmp_path)
    store = Store(tmp_path / "results", study)
    for run in study.runs:
        assert worker.work(run, study.unique, store.folders, "cpu") == worker.DONE
        folder = store.folders[run.id]
        assert folder.trained["outcome"] == "trained"
        rows = read_lines(folder.file("steps.jsonl"))
        assert len(rows) == 20 and all(row["grad_norm"] > 0 for row in rows)
