"""analysis.report and analysis.load: what a reader gets, also from damaged studies."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import fake_study as fake
import numpy as np
import pandas as pd
import pytest

from analysis import answer, factorial, load, probes, report, tables, words
from analysis.document import Link, Section, Table, Text, html, markdown
from study.errors import several
from study.spec import StudyError

FEW = {k: fake.VARIANTS[k] for k in ("ct", "cd", "self_pretrain")}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fake.write(tmp_path_factory.mktemp("built") / "grid", variants=FEW)
    report.build(folder)
    return folder / "report"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seeds: one diverged run, one failed, one pending, one mismatch, three broken files."""
    folder = fake.write(tmp_path_factory.mktemp("damaged") / "six", seeds=range(6), variants=FEW)
    fake.diverge(folder, "ct", 2)
    root = fake.folder_of(folder, "cd", 0)
    fake.edit(root / "trained.json", stream_digest="other")
    (fake.folder_of(folder, "self_pretrain", 4) / "run.json").write_text('{"id": ')
    next((root / "measures").glob("0.250-fid-*")).write_text("")
    failed = fake.folder_of(folder, "cd", 1)
    (failed / "trained.json").write_text("[1, 2]")
    start = (failed / "attempts.jsonl").read_text().splitlines()[0]
    (failed / "attempts.jsonl").write_text(
        f'{start}\n{{"event": "end", "reason": "out of memory | on cpu"}}\n{{"event": "st')
    for path in sorted(fake.folder_of(folder, "self_pretrain", 5).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    fake.folder_of(folder, "self_pretrain", 5).rmdir()
    report.build(folder)
    return folder / "report"


def test_contents_in_order(built: Path) -> None:
    text = (built / "report.md").read_text()
    assert re.findall(r"^## (.*)", text, re.M) == [
        "Question", "Answer", "Variants", "Completeness", "Comparisons", "Metric against budget",
        "Score error against sigma", "Samples", "Ledger audit", "Provenance",
        "From a number to its run"]
    assert re.search(r"ct's one-step FID is [\d.]+\u00a0% (lower|higher) than cd's "
                     r"\([\d.]+ against [\d.]+, geometric means; 95 % interval \S+ to \S+\u00a0%, "
                     r"3 seeds\): (the interval includes no difference \(0\); )?screening, "
                     "no verdict", text)
    assert "Stands on 9 of 9 planned runs of digits." in text
    assert "15 runs planned: 15 done" in text


def test_html_stands_alone(built: Path) -> None:
    text = (built / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(https?:|//)', text)


def test_every_measured_number_names_its_file(built: Path) -> None:
    frame = load.load(built.parent).measures
    for row in frame.sample(20, random_state=0).itertuples():
        assert json.loads((built.parent / row.file).read_text())["value"] == row.value
    links = re.findall(r"\]\((\.\./runs/.*?)\)", (built / "report.md").read_text())
    assert len(links) == 6
    assert all((built / link).is_file() for link in links)


def test_damage_is_named(damaged: Path) -> None:
    text = (damaged / "report.md").read_text()
    assert ("30 runs planned: 27 done (1 of them diverged), 1 failed, 1 unfinished, 1 pending."
            in text)
    assert "diverged: loss is not finite at step 250" in text
    assert "out of memory" in text
    for part in ("run.json: cannot be read", "measures/0.250-fid-",
                 "trained.json: cannot be read: Expected `object`",
                 "attempts.jsonl: line 3: cannot be read"):
        assert part in text.split("files could not be read")[1]
    assert "self_pretrain, digits, seed 5" in text and "not started" in text


def test_a_mismatch_stands_in_the_captions(damaged: Path) -> None:
    text = (damaged / "report.md").read_text()
    sentence = ("It stands on a mismatch: digits, seed 0: the images, noise and u drawn differ: "
                "ct, self_pretrain against cd.")
    captions = [line for line in text.splitlines() if line.startswith("*") and sentence in line]
    assert len(captions) >= 5
    assert ["Stands on 6 of 7 distinct scores." in c for c in captions
            if "1 diverged and left out" not in c] == [True]


def test_diverged_and_missing_seeds_are_counted_in_the_answer(damaged: Path) -> None:
    text = (damaged / "report.md").read_text()
    assert re.search(r"4 seeds; 6 planned\): .*screening, no verdict below 6 seeds. "
                     "Diverged: 1 of ct, 0 of cd.", text)


def test_a_study_that_has_not_started(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", variants=FEW)
    (folder / "runs").rename(tmp_path / "elsewhere")
    text = report.build(folder).with_suffix(".md").read_text()
    assert "not answered yet: no seed of 3" in text
    assert "15 runs planned: 0 done" in text


def test_no_primary(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", seeds=[0], variants=FEW, primary=None)
    text = report.build(folder).with_suffix(".md").read_text()
    assert "No primary comparison is declared: nothing is tested." in text
    assert "cd − ct" in text and "self_pretrain −" not in text


def test_what_is_never_measured_is_not_called_missing(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", variants=FEW)
    study = json.loads((folder / "study.json").read_text())
    for run in study["runs"]:
        measures = folder / "runs" / run["folder"] / "measures"
        run["measures"] = [m for m in run["measures"] if m.startswith("1.000-fid-")]
        for file in measures.glob("*.json"):
            if file.name not in run["measures"]:
                file.unlink()
    fake.write_json(folder / "study.json", study)
    text = report.build(folder).with_suffix(".md").read_text()
    assert "No curve: measured at one point of the budget." in text
    assert "## Score error" not in text and "No data" not in text
    study["runs"][0]["measures"].append("1.000-score_error-00000000.json")
    fake.write_json(folder / "study.json", study)
    text = report.build(folder).with_suffix(".md").read_text()
    assert "No data yet: score error against sigma." in text


def test_vectors(tmp_path: Path) -> None:
    primary = fake.PRIMARY | {"metric": "map_error"}
    folder = fake.write(tmp_path / "s", seeds=[0, 1], variants=FEW, vectors=True, primary=primary)
    text = report.build(folder).with_suffix(".md").read_text()
    assert re.search(r"ct's consistency-map error is [^,;]+ \([\d.]+ against [\d.]+, "
                     r"geometric means; 2 seeds: [^,;]+, [^,;]+, too few for an interval\)",
                     text)
    assert "mass between modes, 1 NFE" in text
    assert (folder / "report" / "map_error-digits.png").is_file()


def test_a_primary_per_cell(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", cells=("a", "b"), variants=FEW,
                        primary={"a": fake.PRIMARY | {"nfe": 2}, "b": None})
    study = load.load(folder)
    table = tables.comparisons(study)
    first, second = answer.answers(study, table)
    assert first.startswith("In a, ct's two-step FID is ")
    assert second == "In b, no primary comparison is declared: nothing is tested."
    assert set(table[table.cell == "b"].role) == {"descriptive"}


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    text = "<script>alert(1)</script> | two\nlines"
    section = Section("t", (Text(text), Table(("a",), ((text,), (Link(text, "../x"),)))))
    assert "<script>" not in html("t", [section], tmp_path)
    rows = [r for r in markdown("t", [section]).splitlines() if r.startswith("|")]
    assert len(rows) == 4
    assert "\\| two lines" in rows[2]


def test_command_line(tmp_path: Path) -> None:
    fake.write(tmp_path / "results" / "tiny", seeds=[0], variants=FEW)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, text=True,
                              env=environment, capture_output=True, check=False)

    made = run(str(ROOT / "analysis" / "report.py"), "tiny")
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.strip() == str(Path("results/tiny/report/report.html"))


def test_user_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 2
    assert "no study here" in capsys.readouterr().err
    (tmp_path / "results" / "grid").mkdir(parents=True)
    (tmp_path / "results" / "grid" / "study.json").write_text("{")
    assert report.main(["gird"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: gird: no such study")
    assert "did you mean 'grid'?" in error
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "new.yaml").touch()
    for given in ("new", "sweeps/new.yaml"):
        assert report.main([given]) == 2
        assert capsys.readouterr().err == (
            "error: new: not started: python -m study.run sweeps/new.yaml\n")
    assert report.main(["sweeps/grid.yaml"]) == 2
    error = capsys.readouterr().err
    assert "study.json: cannot be read" in error and error.count("\n") == 1


WRONG_PLANS = {"schema": 9, "runs": 3, "recipes": {}, "seeds": "0", "primary": {"digits": 1},
               "cells": None, "name": ["s"]}


@pytest.mark.parametrize("key", WRONG_PLANS)
def test_a_plan_of_another_shape_is_one_error(tmp_path: Path, key: str) -> None:
    folder = fake.write(tmp_path / "s", seeds=[0], variants=FEW)
    fake.edit(folder / "study.json", **{key: WRONG_PLANS[key]})
    with pytest.raises(StudyError, match=f"study.json: .*{key}"):
        load.load(folder)


def test_files_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", variants=FEW)
    fake.edit(fake.folder_of(folder, "ct", 0) / "trained.json", spend=[1])
    fake.edit(fake.folder_of(folder, "ct", 1) / "trained.json", snapshots=4)
    files = sorted((fake.folder_of(folder, "cd", 2) / "measures").iterdir())
    fake.edit(files[0], settings=["kind"])
    fake.edit(files[1], value="much", draws={}, images=None, floor=[])
    attempts = fake.folder_of(folder, "cd", 0) / "attempts.jsonl"
    attempts.unlink()
    attempts.mkdir()
    report.build(folder)
    problems = load.load(folder).problems
    assert len(problems) == 4
    assert all(any(part in p for p in problems)
               for part in ("spend", "snapshots", "settings", "attempts.jsonl"))


def test_the_answer_gives_means_and_the_way_to_more_seeds(built: Path) -> None:
    text = (built / "report.md").read_text()
    means = {}
    for name in ("ct", "cd"):
        rows = load.load(built.parent).measures
        rows = rows[(rows["name"] == name) & (rows["at"] == 1) & (rows["nfe"] == 1)
                    & (rows["reference"] == "train")]
        means[name] = math.exp(sum(map(math.log, rows["value"])) / 3)
    assert f"({means['ct']:.3g} against {means['cd']:.3g}, geometric means; 95 % " in text
    assert ("The command that made this study, with --set seeds='[0, 1, 2, 3, 4, 5]', trains only "
            "the new seeds." in text)


def test_sentences_beside_the_answer(tmp_path: Path) -> None:
    twin = {"ct_again": fake.Made({"data_stream": 1})}
    folder = fake.write(tmp_path / "s", variants=fake.VARIANTS | twin)
    study = load.load(folder)
    beside = answer.beside(study, tables.comparisons(study))
    assert [s.split(" is ")[0] for s in beside] == [
        "cd_exact's one-step FID", "cd_warm's one-step FID", "ct's one-step FID",
        "ct_warm's one-step FID", "ct_warm's one-step FID",
        "noise floor: ct_again and ct are the same training on other noise and order, so their "
        "difference (" + beside[-1].split("difference (")[1].split(" is ")[0]]
    assert answer.beside(study, tables.comparisons(study).assign(role="descriptive")) == []
    assert not any("ct_warm's" in s and "than cd's" in s for s in beside)  # two factors apart


def test_variants_in_plain_words(built: Path, tmp_path: Path) -> None:
    text = (built / "report.md").read_text().split("## Variants")[1].split("##")[0]
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in text.splitlines() if r[:1] == "|"]
    assert rows[2:] == [
        ["ct", "score: single sample (CT)", "64k own"],
        ["cd", "score: teacher edm (CD)", "64k own"],
        ["self_pretrain", "score: single sample (CT); init: weights of edm_half",
         "32k own + 32k charged"]]
    born = fake.Made({"target": {"kind": "frozen", "run": "edm"}, "batch": 64})
    study = load.load(fake.write(tmp_path / "s", seeds=[0], variants=FEW | {"born": born}))
    assert words.recipes(study.of("digits"))[0][-1][1] == (
        "score: single sample (CT); target: frozen edm; batch: 64")


def test_a_score_measured_in_another_run_is_labelled_with_all_who_use_it(tmp_path: Path) -> None:
    again = {"again": fake.Made(fake.TEACHER, refs=["edm"])}
    folder = fake.write(tmp_path / "s", variants=FEW | again)
    plan = json.loads((folder / "study.json").read_text())
    plan["recipes"] = [r | {"role": "source"} if r["name"] == "cd" else r for r in plan["recipes"]]
    fake.write_json(folder / "study.json", plan | {"primary": None})
    study = load.load(folder)
    found = probes._by_score(study.of("digits"), ["ct", "self_pretrain", "again"])
    assert [(text, names) for text, names, _ in found] == [
        ("single sample (CT)", ["ct", "self_pretrain"]), ("teacher edm (CD)", ["again"])]


# --- named comparisons, and mean and noise ---

FLOOR = {"ct_again": fake.Made({"data_stream": 1})}
BLEND = {"kind": "blend", "alpha": 0.0, "beta": 1.0, "run": "edm", "residual": "posterior"}
SQUARE = {"cd": fake.Made(fake.TEACHER, 0.0, ["edm"]),
          "noisy": fake.Made({"score": BLEND}, 0.3, ["edm"]),
          "gaussian": fake.Made({"score": BLEND | {"residual": "gaussian"}}, 0.0, ["edm"]),
          "exact": fake.Made({"score": {"kind": "empirical"}}, -0.5),
          "ct": fake.Made(effect=-0.1)}


def test_named_comparisons_stand_first_whatever_they_differ_in(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", variants=fake.VARIANTS | FLOOR)
    assert load.load(folder).compare == ()  # written before there was such a key
    fake.edit(folder / "study.json", compare=[["self_pretrain", "ct_warm"], ["cd", "cd_exact"]])
    study = load.load(folder)
    table = tables.comparisons(study)
    assert table.role.tolist()[:4] == ["primary", "named", "named", "secondary"]
    assert table[table.role == "named"][["variant", "baseline"]].to_numpy().tolist() == [
        ["self_pretrain", "ct_warm"], ["cd", "cd_exact"]]  # as named, not as oriented otherwise
    assert (table.family.dropna() == table.p_holm.notna().sum()).all()
    text = report.build(folder).with_suffix(".md").read_text().split("## Answer")[1]
    bullets = [line for line in text.split("##")[0].splitlines() if line.startswith("- ")]
    assert bullets[0].startswith("- self_pretrain's one-step FID is ")
    assert "They differ in init, budget split (32k own + 32k charged)." in bullets[0]
    assert bullets[1].startswith("- cd's one-step FID is ") and "differ in" not in bullets[1]
    fake.edit(folder / "study.json", compare=[["ct", "none"]])
    with pytest.raises(StudyError, match="compare: no variant 'none'"):
        load.load(folder)


def test_many_comparisons_stay_in_the_table(tmp_path: Path) -> None:
    more = {f"k{k}": fake.Made({"repeat": k}) for k in (2, 3, 4, 5)}
    folder = fake.write(tmp_path / "s", seeds=[0], variants=FEW | more | FLOOR)
    fake.edit(folder / "study.json", compare=[["k4", "ct"]])
    study = load.load(folder)
    table = tables.comparisons(study)
    assert answer.named(study, table)[0].startswith("k4's one-step FID is ")
    floor, rest = answer.beside(study, table)
    assert floor.startswith("noise floor: ct_again and ct")
    assert rest == ("9 more comparisons that differ in one factor: see the table under "
                    "Comparisons.")


def test_contrasts_of_mean_and_noise_by_hand() -> None:
    g = np.log([[2.0, 4.0, 1.0, 8.0], [1.0, 1.0, 1.0, 1.0]])  # teacher, noisy, exact, single
    found = factorial.contrasts(g)
    two = math.log(2)  # mean: (1 - 2 + 3 - 2) / 2, noise: (2 - 1 + 3 - 0) / 2, rest: 3 - 1
    assert found["mean"].tolist() == pytest.approx([0.0, 0.0])
    assert found["noise"].tolist() == pytest.approx([2 * two, 0.0])
    assert found["interaction"].tolist() == pytest.approx([2 * two, 0.0])
    assert (found["mean"] + found["noise"]).tolist() == pytest.approx(g[:, 3] - g[:, 0])


def test_mean_and_noise_of_a_study(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", variants=SQUARE, noise=0.0)
    study = load.load(folder)
    assert factorial.corners(study.of("digits")) == [
        ("cd", "noisy", "exact", "ct")]
    frame = factorial.effects(study)
    assert frame.contrast.tolist() == ["mean", "noise", "interaction"]
    assert frame.effect.tolist() == pytest.approx([-0.45, 0.35, 0.1])
    assert frame.low.tolist() == pytest.approx([-0.45, 0.35, 0.1]) and set(frame.n) == {3}
    text = report.build(folder).with_suffix(".md").read_text()
    assert "the exact mean instead of the teacher's changes the one-step FID by −36" in text
    assert text.split("## Mean and noise")[1].split("\n## ")[0].count("| digits |") == 3
    fake.diverge(folder, "noisy", 1)  # a corner less: the block is left out
    frame = factorial.effects(load.load(folder))
    assert set(frame.n) == {2} and frame.low.isna().all()
    other = SQUARE | {"exact": fake.Made({"score": {"kind": "empirical"}, "batch": 64})}
    study = load.load(fake.write(tmp_path / "t", [0], variants=other))
    assert not factorial.corners(study.of("digits"))


ROW = {"metric": "fid", "nfe": 1, "variant": "a", "baseline": "b", "n": 6, "planned": 6,
       "diverged": 0, "diverged_variant": 0, "diverged_baseline": 0, "matched": "yes",
       "mean_variant": 2.0, "mean_baseline": 1.0, "effect": 0.5, "percent": 64.9, "low": 0.2,
       "high": 0.8, "p_holm": 0.1, "family": 15.0, "points": "0:+0.4 1:+0.6",
       "verdict": "undecided"}


@pytest.mark.parametrize(("changes", "end"), [
    ({}, "6 seeds): undecided: Holm p = 0.100 over 15 comparisons."),
    ({"diverged": 1, "diverged_variant": 1},
     "undecided: the two did not diverge equally often. Diverged: 1 of a, 0 of b."),
    ({"low": -0.1}, "the interval includes no difference (0); undecided."),
    ({"verdict": "refuted", "low": -0.8, "high": -0.2},
     "the claim that a is worse is refuted: a is better."),
    ({"verdict": "refuted", "low": -0.8, "high": 0.01},
     "the claim that a is worse is refuted: the upper bound lies below the margin."),
    ({"verdict": "tie"}, "a tie: the 90 % interval lies within the margin."),
    ({"n": 5, "verdict": "screening: no verdict"},
     "5 seeds; 6 planned): screening, no verdict below 6 seeds."),
    ({"n": 1, "points": "0:+0.5", "planned": 1, "verdict": "screening: no verdict"},
     "than b's (2 against 1; 1 seed, too few for an interval): screening, no verdict below 6 "
     "seeds."),
    ({"points": "0:+0 1:-0", "effect": 0.0},
     "a's one-step FID is b's in every seed (2; 6 seeds)."),
    ({"percent": -0.03, "effect": -0.0003, "low": -0.2},
     "(0); undecided.")])
def test_sentences_give_their_reason(changes: dict, end: str) -> None:
    text = answer.sentence(pd.Series(ROW | changes))
    assert text.endswith(end)
    assert "0.0\u00a0%" not in text


def test_what_is_left_beside_a_fixed_point() -> None:
    assert answer.sentence(pd.Series(ROW | {"matched": "no"}), fixed=True).endswith(
        "what is left is the network's own error.")


def test_numbers_in_words() -> None:
    assert [words.signed(x) for x in (-0.0, 0.0, -0.25)] == ["0", "0", "\u22120.25"]
    assert words.interval(-0.0001, 0.1, True) == "0 to +11\u00a0%"
    assert words.value((31.4, 31.4, 31.4, 1), 1) == "31.4"
    assert words.value((31.4, 31.4, 31.4, 1), 3) == "31.4\n(n 1)"
    assert words.value((2.0, 1.0, 3.0, 3), 3) == "2\n(1 to 3)"
    assert [words.seconds(x) for x in (0.648, 12.345, 12345.0)] == [
        "0.648 s", "12.3 s", "12,300 s"]
    assert several(1, "mismatch") == "1 mismatch"
    assert several(2, "mismatch") == "2 mismatches"


def test_uncommitted_changes_are_told_once_under_the_answer(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", variants=FEW)
    log = fake.folder_of(folder, "ct", 0) / "attempts.jsonl"
    log.write_text(log.read_text().replace('"dirty": false', '"dirty": true'))
    text = report.build(folder).with_suffix(".md").read_text()
    sentence = "1 run was started from a checkout with uncommitted changes."
    assert text.count(sentence) == 2
    assert sentence in text.split("## Variants")[0] and "1 mismatch:" in text
    assert sentence in text.split("## Ledger audit")[1].split("##")[0]


# --- seeds of two machines ---


def other_data(folder: Path, names: Iterable[str], seed: int) -> None:
    """The runs of a seed stand on other images under the same name."""
    for name in names:
        fake.edit(fake.folder_of(folder, name, seed) / "trained.json", data_digest="e" * 16)


def test_seeds_on_different_data_are_told_apart(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", seeds=(0, 1), variants=FEW)
    own = fake.digest("data", "digits")
    other_data(folder, (*FEW, *fake.SOURCES), 1)
    text = report.build(folder).with_suffix(".md").read_text()
    answer, audit = text.split("## Variants")[0], text.split("## Ledger audit")[1].split("##")[0]
    told = (f"digits: seeds 0, 1 stand on different data (digests of seed 0: {own[:8]}; "
            "seed 1: eeeeeeee).")
    assert told in audit and told in answer and "No mismatch" not in text
    heads = [line for line in answer.splitlines() if "ct's one-step FID is" in line]
    assert len(heads) == 2  # each says which it is of
    assert heads[0].startswith(f"**On data {own[:8]} (seed 0), ct's") or heads[0].startswith(
        f"On data {own[:8]} (seed 0), ct's"), heads
    assert "On data eeeeeeee (seed 1), ct's" in heads[1]
    for line in answer.splitlines():
        if "FID" in line and "(1 seed" in line.replace("\u00a0", " "):
            assert "data eeeeeeee (seed 1)" in line or f"data {own[:8]} (seed 0)" in line, line
    rows = [line for line in text.split("## Comparisons")[1].split("##")[0].splitlines()
            if line.startswith("|") and " − " in line]
    labels = [line.split("|")[1].strip() for line in rows]
    assert len(set(labels)) == len(labels) and all(", on data " in x for x in labels), labels
    header = text.split("## Metric against budget")[1].split("\n|")[1]
    assert f"data {own[:8]}" in header and "data eeeeeeee" in header
    table = pd.read_csv(folder / "report" / "comparisons.csv")
    assert set(table.stands_on) == {f"data {own[:8]}", "data eeeeeeee"} and table.n.max() == 1


def test_the_contrasts_of_mean_and_noise_say_their_data(tmp_path: Path) -> None:
    corners = {"cd": fake.VARIANTS["cd"], "ct": fake.VARIANTS["ct"],
               "cd_exact": fake.VARIANTS["cd_exact"],
               "noisy": fake.Made({"score": {"kind": "blend", "alpha": 0, "beta": 1,
                                             "run": "edm"}}, 0.2, ["edm"])}  # fmt: skip
    folder = fake.write(tmp_path / "s", seeds=(0, 1, 2), variants=corners)
    before = report.build(folder).with_suffix(".md").read_text()
    assert "the exact mean instead" in before and "on data" not in before.split("## Variants")[0]
    other_data(folder, (*corners, *fake.SOURCES), 1)
    answer = report.build(folder).with_suffix(".md").read_text().split("## Variants")[0]
    lines = [x for x in answer.splitlines() if "mean instead" in x or "interaction:" in x]
    label = f"on data {fake.digest('data', 'digits')[:8]} (seeds 0, 2), "
    assert len(lines) == 2 and all(label in x for x in lines), lines


@pytest.mark.parametrize(("key", "old", "what"), [
    ("torch", "2.15.0", "versions of torch"), ("device", "cpu", "kinds of device"),
    ("code", "0123456789abcdef", "digests of the code")])
def test_the_answer_says_which_seeds_ran_on_what(
    key: str, old: str, what: str, tmp_path: Path
) -> None:
    folder = fake.write(tmp_path / "s", seeds=(0, 1, 2), variants=FEW)
    for name in (*FEW, *fake.SOURCES):
        log = fake.folder_of(folder, name, 2) / "attempts.jsonl"
        log.write_text(log.read_text().replace(f'"{key}": "{old}"', f'"{key}": "ffff"'))
    text = report.build(folder).with_suffix(".md").read_text()
    runs = len(FEW) + len(fake.SOURCES)
    told = (f"The runs stand on 2 {what}: {old} ({2 * runs} runs of seeds 0, 1), "
            f"ffff ({runs} runs of seed 2)")
    assert told in text.split("## Variants")[0]
    assert told in text.split("## Ledger audit")[1].split("##")[0]


# --- one network in all seeds, and extractors that may know the held-out images ---

OWN_SIDE = "one network: the interval is of sampling and of the other side only"


def test_the_answer_about_one_network_is_no_verdict(tmp_path: Path) -> None:
    as_is = {"init": {"kind": "weights", "weights": "ect.pkl"}, "budget": {"images": 0}}
    folder = fake.write(tmp_path / "s", seeds=range(6), variants=FEW | {
        "ect": fake.Made(as_is, 1.0)}, primary=fake.PRIMARY | {"variant": "ect"})
    study = load.load(folder)
    assert len(answer.powers(study, tables.comparisons(study))) == 1
    for seed in range(6):
        fake.edit(fake.folder_of(folder, "ect", seed) / "trained.json", init_digest="same")
    text = report.build(folder).with_suffix(".md").read_text()
    told = text.split("## Answer")[1].split("## Variants")[0]
    assert re.search(r"6 seeds\): no verdict, as ect is " + OWN_SIDE + r"\. The two", told)
    assert "chance of 80 %" not in told and "supported" not in told.split("- ")[0]
    table = text.split("## Comparisons")[1].split("\n## ")[0]
    assert f"No verdict on a side that is {OWN_SIDE}." in table
    line = next(r for r in table.splitlines() if r.startswith("| **ect − cd"))
    assert [c.strip(" *") for c in line.split("|")][-6:-3] == ["–", "–", "one network"]
    values = text.split("at their last point:")[1].split("\n\n")[0]
    assert "ect: one network in all seeds, whose values differ in sampling alone." in values


@pytest.mark.parametrize(("changes", "end"), [
    ({"shared": "a"}, f"no verdict, as a is {OWN_SIDE}."),
    ({"shared": "a, b"}, "as each side is one network: the interval is of sampling only.")])
def test_sentences_of_one_network(changes: dict, end: str) -> None:
    row = pd.Series(ROW | {"verdict": "one network: no verdict"} | changes)
    assert answer.sentence(row).endswith(end)


def test_a_teacher_that_all_seeds_share_keeps_the_verdict_and_is_told(tmp_path: Path) -> None:
    worse = {"ct": fake.Made(effect=0.5), "cd": fake.VARIANTS["cd"]}
    folder = fake.write(tmp_path / "s", seeds=range(6), variants=worse)
    told = ("edm, the teacher or first weights of cd, is shared by all seeds: no interval over "
            "seeds covers its own variation.")
    assert told not in report.build(folder).with_suffix(".md").read_text()
    for seed in range(6):
        file = fake.folder_of(folder, "edm", seed) / "trained.json"
        spend = json.loads(file.read_text())["spend"]
        fake.edit(file, init_digest="same", spend=spend | {"images": 0})
    text = report.build(folder).with_suffix(".md").read_text()
    assert "the claim that ct is worse is supported." in text
    assert told in text.split("## Variants")[0]
    for section in ("Comparisons", "Metric against budget"):  # a table and a figure each
        assert text.split(f"## {section}")[1].split("\n## ")[0].count(told) == 2


SEEN = "the extractor may have been trained on some of these held-out images."


@pytest.mark.parametrize(("kind", "extractor", "captions"), [
    ("images", "cifar10-cnn:9e8d7c6b", 4),  # values of variants and sources, curves, run by run
    ("images", "inception-v3-compat:6726825d", 0), ("cifar10", "cifar10-cnn:9e8d7c6b", 0)])
def test_held_out_images_that_an_extractor_may_know(tmp_path: Path, kind: str, extractor: str,
                                                    captions: int) -> None:
    data = {"data": {"kind": kind, "root": "cifar"}}
    made = {n: fake.Made({**m.changes, **data}, m.effect, m.refs) for n, m in FEW.items()
            if n != "self_pretrain"}
    folder = fake.write(tmp_path / "s", seeds=[0], variants=made)
    for file in folder.glob("runs/*/measures/*-fid-*"):
        settings = json.loads(file.read_text())["settings"]
        fake.edit(file, settings=settings | {"extractor": extractor})
    text = report.build(folder).with_suffix(".md").read_text()
    assert text.count(SEEN) == captions
    plan = json.loads((folder / "study.json").read_text())
    primary = plan["primary"]["digits"] | {"reference": "held_out"}
    fake.edit(folder / "study.json", primary={"digits": primary})
    table = report.build(folder).with_suffix(".md").read_text().split("## Comparisons")[1]
    assert (SEEN in table.split("\n## ")[0]) == (captions > 0)
