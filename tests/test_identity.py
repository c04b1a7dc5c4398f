"""What enters a run's id, what doesn't, and that ids of yesterday are ids of today."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import TWO_MODES, read, replaced


def ids(tmp_path: Path, text: str = TWO_MODES) -> dict[tuple[str, int], str]:
    """Run ids by name and seed."""
    return {(r.recipe.name, r.seed): r.id for r in read(tmp_path, text).runs}


FROZEN = """\
base:
  data: digits
  network: {kind: unet, width: 8}
  budget: {images: 64000}
  optimizer: {kind: adam, lr: 2e-3}
  discretization: {kind: doubling, s0: 10, s1: 160}
sources:
  edm:       {objective: denoising}
  edm_half:  {objective: denoising, budget: {share: 0.5}}
  ct_first:  {from: ct}
variants:
  ct:            {score: single_sample}
  cd:            {score: {kind: teacher, run: edm}}
  cd_exact:      {score: empirical}
  ct_warm:       {from: ct, init: {run: edm}}
  born_again:    {from: ct, target: {kind: frozen, run: ct_first}}
  self_pretrain: {from: ct, init: {run: edm_half}, charge: [edm_half]}
"""
GOLDEN = {
    "edm": "295216df5f",
    "edm_half": "028ac9689f",
    "ct_first": "787a7793fa",
    "ct": "5355f14ec3",
    "cd": "78c2bfe0c4",
    "cd_exact": "a93cc6cc2a",
    "ct_warm": "cf60f93119",
    "born_again": "6433a15752",
    "self_pretrain": "0934c8b72c",
}


def test_golden_ids(tmp_path: Path) -> None:
    """A change here orphans every finished run of every user: raise SCHEMA and say so."""
    found = {name: i for (name, seed), i in ids(tmp_path, FROZEN).items() if seed == 0}
    assert found == GOLDEN


@pytest.mark.parametrize("old, new", [
    ("question: Does it work?", "question: Does it?"),
    ("  sliced_wasserstein: {samples: 256, draws: 1}", "  sliced_wasserstein: {samples: 128}"),
    ("seeds: [0, 1]", "seeds: [1, 0, 2]"),
    ("batch: 64", "batch: 64\n  dropout: 0.0"),  # a default written out
    ("batch: 64", "batch: 64\n  precision: float32"),
    ("std: 0.2", "std: 2.0e-1"),  # the same value otherwise written
    ("{score: single_sample}", "{from: preset:ct}"),
])  # fmt: skip
def test_what_an_id_leaves_out(old: str, new: str, tmp_path: Path) -> None:
    before, after = ids(tmp_path), ids(tmp_path, replaced(old, new))
    assert {k: after[k] for k in before} == before


@pytest.mark.parametrize("old, new", [
    ("std: 0.2", "std: 0.3"), ("batch: 64", "batch: 32"), ("images: 1280", "images: 640"),
    ("width: 16", "width: 8"), ("batch: 64", "batch: 64\n  data_stream: 1"),
    ("batch: 64", "batch: 64\n  weights_ema: [0.05]"),
    ("batch: 64", "batch: 64\n  precision: bfloat16"),
    ("batch: 64", "batch: 64\n  law: uniform_grid"),
    ("batch: 64", "batch: 64\n  optimizer: radam"),
])  # fmt: skip
def test_what_enters_every_id(old: str, new: str, tmp_path: Path) -> None:
    before, after = ids(tmp_path), ids(tmp_path, replaced(old, new))
    assert not set(before.values()) & set(after.values())


def test_a_student_schedule_retrains_no_teacher_but_its_students(tmp_path: Path) -> None:
    before, after = ids(tmp_path), ids(tmp_path, replaced("N: 10", "N: 20"))
    assert before["edm", 0] == after["edm", 0]
    assert before["ct", 0] != after["ct", 0] and before["cd", 0] != after["cd", 0]


@pytest.mark.parametrize("target", ["{kind: ema, mu: 0.9}", "{kind: ema, mu: 0.9, s0: 2}"])
def test_a_students_averaged_target_enters_its_id_alone(target: str, tmp_path: Path) -> None:
    before = ids(tmp_path)
    after = ids(tmp_path, replaced("batch: 64", f"batch: 64\n  target: {target}"))
    assert before["edm", 0] == after["edm", 0]
    assert before["ct", 0] != after["ct", 0] and before["cd", 0] != after["cd", 0]


def test_heun_on_single_samples_is_euler_and_along_a_teacher_is_not(tmp_path: Path) -> None:
    before = ids(tmp_path)
    after = ids(tmp_path, replaced("batch: 64", "batch: 64\n  solver: heun"))
    assert after["ct", 0] == before["ct", 0]
    assert after["cd", 0] != before["cd", 0]
    assert after["edm", 0] == before["edm", 0]  # a denoiser has no solver
    frozen = "{score: single_sample, target: {kind: frozen, run: first}, solver: %s}"
    own = [
        ids(tmp_path, replaced("{score: single_sample}", frozen % solver)
            .replace("sources:", "sources:\n  first: {}"))["ct", 0]
        for solver in ("euler", "heun")
    ]  # fmt: skip
    assert own[0] == own[1] != before["ct", 0]


def test_a_teacher_renamed_keeps_its_students_a_changed_one_does_not(tmp_path: Path) -> None:
    before = ids(tmp_path)
    renamed = ids(tmp_path, TWO_MODES.replace("edm", "phi"))
    text = replaced("{objective: denoising}", "{objective: denoising, dropout: .1}")
    changed = ids(tmp_path, text)
    assert renamed["cd", 0] == before["cd", 0] and renamed["phi", 0] == before["edm", 0]
    assert changed["cd", 0] != before["cd", 0] and changed["ct", 0] == before["ct", 0]


def test_a_source_twin_is_another_run(tmp_path: Path) -> None:
    text = replaced("  edm: {objective: denoising}",
                    "  edm: {objective: denoising}\n  ct_first: {from: ct}")
    found = ids(tmp_path, text)
    assert found["ct_first", 0] != found["ct", 0]
