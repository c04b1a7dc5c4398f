"""analysis.tables and analysis.ledger on synthetic studies whose effects are known."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import fake_study as fake
import numpy as np
import pandas as pd
import pytest

from analysis import identities, ledger, load, shared, stats, tables

END = {"nfe": 1, "at": 1.0, "reference": "train", "metric": "fid"}


def table_of(folder: Path) -> pd.DataFrame:
    return tables.comparisons(load.load(folder))


def row_of(table: pd.DataFrame, variant: str, baseline: str, **where: object) -> pd.Series:
    rows = tables.select(table, {"variant": variant, "baseline": baseline, **END, **where})
    assert len(rows) == 1
    return rows.iloc[0]


def value_of(folder: Path, name: str, seed: int) -> float:
    """One-step FID at the end, straight from the run's files."""
    for file in (fake.folder_of(folder, name, seed) / "measures").glob("1.000-fid-*"):
        record = json.loads(file.read_text())
        if record["settings"]["nfe"] == 1 and record["settings"]["reference"] == "train":
            return record["value"]
    raise AssertionError(name)


def test_effects_without_noise_are_the_ones_written(tmp_path: Path) -> None:
    table = table_of(fake.write(tmp_path / "s", noise=0.0))
    for name, made in fake.VARIANTS.items():
        if name != "cd":
            row = row_of(table, name, "cd")
            assert row.effect == pytest.approx(made.effect, abs=1e-9)
            assert row.percent == pytest.approx(100 * (math.exp(made.effect) - 1))


def test_effect_is_the_mean_of_paired_logs(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s")
    d = [math.log(value_of(folder, "ct", s) / value_of(folder, "cd", s)) for s in range(3)]
    row = row_of(table_of(folder), "ct", "cd")
    assert (row.n, row.planned, row.role, row.matched) == (3, 3, "primary", "yes")
    assert row.effect == pytest.approx(np.mean(d))
    half = 4.302653 * np.std(d, ddof=1) / math.sqrt(3)
    assert (row.low, row.high) == pytest.approx((np.mean(d) - half, np.mean(d) + half), rel=1e-6)
    assert row.verdict == "screening: no verdict"


SPLIT = "budget split (32k own + 32k charged)"


def test_pairs_are_primary_against_and_one_factor(tmp_path: Path) -> None:
    pairs = tables.pairs(load.load(fake.write(tmp_path / "s")).of("digits"))
    made = {(p.variant, p.baseline): (p.role, p.differs) for p in pairs}
    assert made == {
        ("ct", "cd"): ("primary", ("score",)), ("cd_exact", "cd"): ("secondary", ("score",)),
        ("ct_warm", "cd"): ("secondary", ("score", "init")),
        ("cd_warm", "cd"): ("secondary", ("init",)),
        ("self_pretrain", "cd"): ("secondary", ("score", "init", SPLIT)),
        ("ct", "cd_exact"): ("secondary", ("score",)),  # toward the primary's variant
        ("ct_warm", "ct"): ("secondary", ("init",)),
        ("ct_warm", "cd_warm"): ("secondary", ("score",)),  # oriented like ct - cd
        ("self_pretrain", "ct"): ("secondary", ("init", SPLIT))}  # and not against ct_warm


def test_budgets_are_oriented_like_the_primary(tmp_path: Path) -> None:
    made = {n: fake.Made({"budget": {"images": fake.IMAGES // k}})
            for n, k in (("whole", 1), ("half", 2), ("quarter", 4))}
    primary = fake.PRIMARY | {"variant": "half", "against": "whole"}
    study = load.load(fake.write(tmp_path / "s", variants=made, primary=primary))
    assert [(p.variant, p.baseline) for p in tables.pairs(study.of("digits"))] == [
        ("half", "whole"), ("quarter", "whole"), ("quarter", "half")]


def test_equal_images_with_and_without_sources(tmp_path: Path) -> None:
    table = table_of(fake.write(tmp_path / "s"))
    columns = ["matched", "matched_with_sources"]
    for pair, equal in ((("ct", "cd_exact"), ["yes", "yes"]), (("ct_warm", "ct"), ["yes", "no"]),
                        (("cd_warm", "cd"), ["yes", "yes"]),
                        (("self_pretrain", "ct"), ["yes", "yes"])):
        assert row_of(table, *pair)[columns].tolist() == equal


def test_what_a_file_of_weights_cost_is_not_known(tmp_path: Path) -> None:
    """Nor of what learns from it; where both sides have no file it is."""
    file = {"init": {"kind": "weights", "weights": "edm.pkl"}}
    folder = fake.write(tmp_path / "s", variants=fake.VARIANTS | {"tuned": fake.Made(file)})
    table = table_of(folder)
    columns = ["matched", "matched_with_sources"]
    assert row_of(table, "tuned", "ct")[columns].tolist() == ["yes", "unknown"]
    plan = json.loads((folder / "study.json").read_text())
    edm = next(r for r in plan["recipes"] if r["name"] == "edm")
    edm["factors"] |= file
    (folder / "study.json").write_text(json.dumps(plan))
    table = table_of(folder)
    for pair, equal in ((("ct_warm", "ct"), "unknown"), (("cd_warm", "cd"), "unknown"),
                        (("ct", "cd"), "unknown"), (("ct", "cd_exact"), "yes")):
        assert row_of(table, *pair)[columns].tolist() == ["yes", equal]
    bill = load.load(folder).runs.set_index("name")
    assert bill.loc["cd", "flops_with_sources"].isna().all()
    assert bill.loc["cd", ["flops", "images_total"]].notna().all(axis=None)


def test_a_budget_that_is_not_charged_is_a_factor(tmp_path: Path) -> None:
    half = fake.Made({"budget": {"images": fake.IMAGES // 2}})
    folder = fake.write(tmp_path / "s", variants={"ct": fake.VARIANTS["ct"], "half": half,
                                                  "cd": fake.VARIANTS["cd"]})
    row = row_of(table_of(folder), "half", "ct")
    assert (row.differs, row.matched) == ("budget", "no")
    sentences = [m.sentence for m in ledger.audit(load.load(folder))]
    assert sentences == ["digits, seeds 0, 1, 2: own + charged images differ: "
                         "64,000 for ct, cd; 32,000 for half."]


def test_unlike_identities_never_meet(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s")
    root = fake.folder_of(folder, "ct", 0) / "measures"
    for file in root.glob("*-fid-*"):
        settings = json.loads(file.read_text())["settings"]
        fake.edit(file, settings=settings | {"extractor": "digits-cnn:ffffffff"})
    study = load.load(folder)
    rows = tables.select(tables.comparisons(study), {"variant": "ct", "baseline": "cd", **END})
    assert sorted(rows.n) == [0, 2]
    assert rows.identity.nunique() == 2
    summary = tables.summary(study.of("digits"), "variant")
    assert len([k for k in summary.columns if "ffffffff" in k[1]]) == 4
    assert len(set(tables.headings(list(summary.columns)))) == len(summary.columns)
    for metric, what in summary.columns:
        names = study.measures[(study.measures.identity == what)
                               & (study.measures.metric == metric)].name.unique()
        assert set(summary.index[summary[(metric, what)].notna()]) == set(names)


def test_what_tells_identities_apart_is_told_whole() -> None:
    one, two = (f'k[ema=raw, N=[20, {n}], score={{"kind": "a", "k": {n}}}, data_digest=0a1b2c3d4]'
                for n in (40, 80))
    assert identities.apart([one, two, one]) == {
        one: 'N=[20, 40], score={"kind": "a", "k": 40}',
        two: 'N=[20, 80], score={"kind": "a", "k": 80}'}
    assert identities.apart([one]) == {one: ""}


def test_other_data_is_another_identity(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s")
    fake.edit(fake.folder_of(folder, "cd", 1) / "trained.json", data_digest="other")
    rows = tables.select(table_of(folder), {"variant": "ct", "baseline": "cd", **END})
    assert rows.n.max() == 2


def test_diverged_run_leaves_the_interval_and_bars_supported(tmp_path: Path) -> None:
    worse = {"ct": fake.Made(effect=0.5), "cd": fake.VARIANTS["cd"]}
    folder = fake.write(tmp_path / "s", seeds=range(7), variants=worse)
    assert row_of(table_of(folder), "ct", "cd").verdict == "supported"
    fake.diverge(folder, "ct", 3)
    row = row_of(table_of(folder), "ct", "cd")
    assert (row.n, row.planned, row.diverged, row.verdict) == (6, 7, 1, "undecided")
    assert "3:" not in row["points"].split()
    half = row_of(table_of(folder), "ct", "cd", at=0.5)  # it was measured there, yet it is out
    assert (half.n, half.role, half.verdict) == (6, "descriptive", "")
    fake.diverge(folder, "cd", 3)
    assert row_of(table_of(folder), "ct", "cd").verdict == "supported"


def test_cells_are_never_pooled_and_holm_spans_them(tmp_path: Path) -> None:
    table = table_of(fake.write(tmp_path / "s", cells=("a", "b")))
    assert row_of(table, "ct", "cd", cell="a").n == row_of(table, "ct", "cd", cell="b").n == 3
    family = table[table.role == "secondary"]
    assert len(family) == 16
    assert family.p_holm.min() == pytest.approx(min(1.0, 16 * family.p.min()))
    assert table[table.role == "primary"].p_holm.isna().all()


def test_names_of_one_run_are_counted_once(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s")
    plan = json.loads((folder / "study.json").read_text())
    recipe = next(r for r in plan["recipes"] if r["name"] == "ct")
    plan["recipes"].append(recipe | {"name": "heun"})
    plan["runs"] += [r | {"recipe": len(plan["recipes"]) - 1} for r in plan["runs"]
                     if plan["recipes"][r["recipe"]]["name"] == "ct"]
    fake.write_json(folder / "study.json", plan)
    study = load.load(folder)
    assert "heun" not in tables.variants(study.of("digits"))
    assert set(study.runs[study.runs.name == "heun"].same_as) == {"ct"}
    assert row_of(tables.comparisons(study), "ct", "cd").n == 3


def test_spend_with_sources_counts_each_source_once(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", variants=fake.VARIANTS | {
        "both": fake.Made({**fake.TEACHER, **fake.WARM}, refs=["edm", "edm_half", "edm"])})
    spend = ledger.spend(load.load(folder)).set_index("name")
    assert spend.images_with_sources["both"] == 2.5 * fake.IMAGES
    assert spend.passes_with_sources["ct"] == spend.passes["ct"] == 4 * fake.IMAGES
    assert spend.images_total["self_pretrain"] == fake.IMAGES
    assert spend.images_with_sources["self_pretrain"] == fake.IMAGES


def test_audit_names_every_mismatch(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s")
    assert ledger.audit(load.load(folder)) == []
    fake.edit(fake.folder_of(folder, "cd", 1) / "trained.json", stream_digest="zz")
    fake.edit(fake.folder_of(folder, "ct", 2) / "trained.json", init_digest="zz")
    log = fake.folder_of(folder, "ct", 0) / "attempts.jsonl"
    log.write_text(log.read_text().replace("0123456789abcdef", "fff0000"))
    assert [m.sentence for m in ledger.audit(load.load(folder))] == [
        "digits, seed 1: the images, noise and u drawn differ: "
        "ct, cd_exact, ct_warm, cd_warm, self_pretrain against cd.",
        "digits, seed 2: the random initial weights differ: ct against cd, cd_exact.",
        "The runs stand on 2 digests of the code: 0123456789abcdef (23 runs of "
        "seeds 0, 1, 2), fff0000 (1 run of seed 0); "
        "a resumed run can stand on several."]


def test_a_missing_measurement_is_work_and_named(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s")
    file = next((fake.folder_of(folder, "ct", 0) / "measures").glob("1.000-fid-*"))
    file.unlink()
    study = load.load(folder)
    assert study.missing[["name", "seed", "file", "why"]].to_numpy().tolist() == [
        ["ct", 0, file.name, "not measured yet"]]
    assert study.runs[(study.runs.name == "ct") & (study.runs.seed == 0)].state.item() == (
        "unfinished")


def test_loading_scales(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", seeds=range(40))
    start = time.process_time()
    study = load.load(folder)
    seconds = time.process_time() - start
    # 10 000 runs in 30 s are 3 ms a run
    assert len(study.runs) == 320
    assert seconds / len(study.runs) < 0.003


def test_runs_that_began_with_different_files_of_one_name_are_a_mismatch(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "study")
    one, two = (fake.folder_of(folder, n, 1) for n in ("ct", "cd"))
    for run in (one, two):
        fake.edit(run / "trained.json", inputs={"edm.pkl": "a" * 64})
    study = load.load(folder)
    assert not [m for m in ledger.audit(study) if m.what == "inputs"]
    fake.edit(two / "trained.json", inputs={"edm.pkl": "b" * 64})
    study = load.load(folder)
    assert study.files == {"edm.pkl": {"a" * 64: [one.name], "b" * 64: [two.name]}}
    (told,) = (m for m in ledger.audit(study) if m.what == "inputs")
    assert "different files called edm.pkl: aaaaaaaa (1 run) against bbbbbbbb (1" in told.sentence


def test_a_source_trained_again_since_is_a_mismatch(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "study")
    assert not load.load(folder).strays
    student, teacher = (fake.folder_of(folder, n, 1) for n in ("cd", "edm"))
    fake.edit(teacher / "trained.json", sha256={"snapshots/1.000.pt": "b" * 64})
    fake.edit(student / "trained.json", inputs={teacher.name.rpartition("-")[2]: "a" * 64})
    study = load.load(folder)
    assert study.strays == (student.name,)
    assert any(student.name in m.sentence for m in ledger.audit(study))


# --- one network in all seeds ---

OUTSIDE = {"kind": "weights", "weights": "models/ect.pkl"}
AS_IS = {"init": OUTSIDE, "budget": {"images": 0}}
WITH_ECT = {"ct": fake.Made(effect=0.5), "cd": fake.VARIANTS["cd"],
            "cd_exact": fake.VARIANTS["cd_exact"], "ect": fake.Made(AS_IS, 1.0)}


def share(folder: Path, name: str, seeds: range, **trained: object) -> None:
    """Gives a name's runs the same first weights under every seed."""
    for seed in seeds:
        fake.edit(fake.folder_of(folder, name, seed) / "trained.json", init_digest="same",
                  **trained)


def test_one_network_measured_under_six_seeds_is_not_six_runs(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", seeds=range(6), variants=WITH_ECT)
    before = row_of(table_of(folder), "ect", "cd")  # as weights of six runs that differ
    assert (before.verdict, before.shared) == ("supported", "")
    assert before.p < 1e-3 and before.sign_flip_p == 2 / 2**6 and before.family == 3
    share(folder, "ect", range(6))
    study = load.load(folder)
    assert shared.networks(study.of("digits")) == {"ect"}
    table = tables.comparisons(study)
    row = row_of(table, "ect", "cd")
    assert (row.verdict, row.shared, row.n) == (stats.ONE_NETWORK, "ect", 6)
    assert row[["p", "p_holm", "sign_flip_p", "family", "low_pooled"]].isna().all()
    assert row[["effect", "low", "high"]].tolist() == before[["effect", "low", "high"]].tolist()
    plan = json.loads((folder / "study.json").read_text())
    plan["runs"] = [r for r in plan["runs"] if not r["folder"].startswith("ect-")]
    plan["recipes"] = [r for r in plan["recipes"] if r["name"] != "ect"]  # the last of them
    fake.write_json(folder / "study.json", plan)
    without = table_of(folder)
    others = table[(table.variant != "ect") & (table.baseline != "ect")]
    pd.testing.assert_frame_equal(others.reset_index(drop=True), without)  # as if not there


def test_weights_that_differ_between_seeds_are_runs(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", seeds=range(6), variants=WITH_ECT)
    share(folder, "ct", range(6))  # trained from the same weights, so six trainings
    study = load.load(folder)
    assert shared.networks(study.of("digits")) == set()
    assert row_of(tables.comparisons(study), "ct", "cd").verdict == "supported"
    share(folder, "ect", range(1))  # one seed of it is there
    assert shared.networks(load.load(folder).of("digits")) == set()


def test_what_runs_learn_or_start_from_is_followed_to_the_network_that_all_share(
        tmp_path: Path) -> None:
    window = {"kind": "windowed", "inside": {"kind": "single_sample"},
              "outside": {"kind": "teacher", "run": "second"}, "t_low": 0.1, "t_high": 1.0}
    made = {"ct": fake.Made(), "cd": fake.Made(fake.TEACHER), "warm": fake.Made({"init": OUTSIDE}),
            "second": fake.Made(fake.TEACHER), "far": fake.Made({"score": window}),
            "ect": fake.Made(AS_IS), "half": fake.Made({"init": {"kind": "run",
                                                                 "run": "edm_half"}})}
    folder = fake.write(tmp_path / "s", seeds=range(2), variants=made)
    none = shared.below(load.load(folder).of("digits"))
    assert not any(none.values())
    spend = json.loads((fake.folder_of(folder, "edm", 0) / "trained.json").read_text())["spend"]
    share(folder, "edm", range(2), spend=spend | {"images": 0})
    for name in ("warm", "ect"):
        share(folder, name, range(2))
    study = load.load(folder)
    assert shared.networks(study.of("digits")) == {"edm", "ect"}
    below = shared.below(study.of("digits"))
    assert {n: s for n, s in below.items() if s} == {
        "cd": ["edm"], "second": ["edm"], "far": ["edm"], "warm": ["ect.pkl"]}
    text = shared.owed(study.of("digits"), ["ct", "cd", "far", "warm", "ect", "cd"])
    assert text == (
        "ect: one network in all seeds, whose values differ in sampling alone. "
        "edm, the teacher or first weights of cd, far, is shared by all seeds: no interval over "
        "seeds covers its own variation. ect.pkl, the teacher or first weights of warm, is shared "
        "by all seeds: no interval over seeds covers its own variation.")
    assert shared.owed(study.of("digits"), ["ct", "half"]) == ""


@pytest.mark.parametrize(("first", "second", "told"), [
    ("nfe=2", "mid=0.8, nfe=2", ("no mid", "mid=0.8")),
    ("nfe=2, levels=[1, 2]", "nfe=2, levels=[1, 2, 1]", ("levels=[1, 2]", "levels=[1, 2, 1]")),
    ('nfe=2, score={"k": 1, "n": 2}', 'nfe=2, score={"k": 1, "n": 3}',
     ('score={"k": 1, "n": 2}', 'score={"k": 1, "n": 3}')),
    ("nfe=2, levels=[1, 2]", "mid=0.8, nfe=2", ("levels=[1, 2], no mid", "no levels, mid=0.8"))])
def test_headings_tell_settings_whole_and_those_that_lack(
    first: str, second: str, told: tuple[str, str]
) -> None:
    whats = [f"fid[{x}, data_digest=aa]" for x in (first, second)]
    assert tables.headings([("fid", w) for w in whats]) == [f"FID, 2 NFE, {t}" for t in told]
