"""analysis on instruments' files: numbers arrive, nothing breaks, fixed points cost nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import fake_study as fake
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import (
    answer,
    instruments,
    ledger,
    load,
    oracle,
    probes,
    recipes,
    records,
    report,
    tables,
    words,
)
from analysis.levels import one, over_seeds, rows_of
from analysis.style import look, palette

FEW = {k: fake.VARIANTS[k] for k in ("ct", "cd", "cd_exact")}
DRAWN = {"gradient_noise", "gradient_parts", "gradient_step", "gradient_cosine", "gradient_slopes",
         "gradient_rounding", "trajectories", "drift"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fake.write(tmp_path_factory.mktemp("built") / "grid", variants=FEW)
    fake.instruments(folder)
    report.build(folder)
    return folder / "report"


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fake.oracle_study(tmp_path_factory.mktemp("line") / "oracle")
    report.build(folder)
    return folder / "report"


def section(folder: Path, title: str) -> str:
    return (folder / "report.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def table(text: str, index: int = 0) -> list[dict[str, str]]:
    """The rows of one of the tables of a section, by heading."""
    runs = [t for t in text.strip().split("\n\n") if t.startswith("|")]
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in runs[index].splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def file_of(folder: Path, name: str, seed: int, kind: str, at: str = "1.000") -> Path:
    return next((fake.folder_of(folder, name, seed) / "measures").glob(f"{at}-{kind}-*"))


def test_a_number_goes_from_file_to_csv_to_table(built: Path) -> None:
    frame = pd.read_csv(built / "instruments.csv")
    values = []
    for seed in range(3):
        file = file_of(built.parent, "ct", seed, "gradient_noise")
        record = json.loads(file.read_text())
        rows = frame[frame.file == str(file.relative_to(built.parent))]
        law = rows[(rows.over == "law") & (rows.quantity == "rho")].iloc[0]
        assert (law.value, law.se) == pytest.approx(
            (record["law"]["rho"], record["law"]["rho_se"]))
        levels = rows[(rows.over == "sigma") & (rows.quantity == "rho")]
        assert levels.level.tolist() == pytest.approx(record["sigma"])
        assert levels.value.tolist()[1:] == pytest.approx(record["rho"][1:])
        assert np.isnan(levels.value.iloc[0])
        assert rows[(rows.quantity == "N") & (rows.over == "run")].value.item() == 161
        values.append(law.value)
    row = table(section(built, "Noise of the gradient"))[1]
    assert (row["variant"], row["at"], row["seeds"]) == ("ct", "100 %", "3")
    assert row["rho"].split(" ± ")[0] == f"{np.mean(values):.3g}"


def test_means_and_errors_over_seeds() -> None:
    rows = pd.DataFrame({"level": [1.0] * 3, "value": [1.0, 2.0, np.nan], "se": [0.3, 0.4, 9.0]})
    assert over_seeds(rows).loc[1.0].to_dict() == {
        "mean": 1.5, "low": 1.0, "high": 2.0, "n": 2.0, "se": pytest.approx(0.5)}
    assert one(rows.assign(se=5.0))["se"] == pytest.approx(5 / 2**0.5)
    assert one(rows.iloc[:0])["n"] == 0


def test_every_kind_has_its_section_table_and_figure(built: Path) -> None:
    assert {p.name.removesuffix("-digits.png") for p in built.glob("*.png")} >= DRAWN
    assert table(section(built, "Direction of the gradient"))[0]["cosine"].startswith("0.9 ± ")
    slopes = table(section(built, "Losses and gradients against N"))[0]
    assert slopes["gradients, fitted"].startswith("\u22120.98 ± ")
    assert slopes["gradients, predicted"] == "\u22121" and "losses, predicted" not in slopes
    half = table(section(built, "Half precision"))
    assert half[0]["one batch"].startswith("0.012 ± ") and half[0]["seeds"] == "3"
    assert [r["mean gradient"] for r in half] == ["0.003 ± 0.00058", "–", "–"]
    paths = table(section(built, "One trajectory, one output"))
    assert [(r["variant"], r["path"]) for r in paths[:3]] == [
        ("ct", "the teacher's"), ("ct", "the second teacher's"), ("ct", "the training set's")]
    assert paths[3]["error at T"].split()[0] == f"{0.1 * 50**0.3:.3g}"
    assert [r["floor"].split()[0] for r in paths[:3]] == ["0.06", "0.06", "–"]
    text = section(built, "Memorisation and coverage")
    nearer = [r["nearer to training images"].split()[0] for r in table(text)]
    assert nearer == ["0.5", "0.6", "0.7"]
    assert table(text, 1)[1]["recall"].split()[0] == "0.6"
    assert table(text, 2)[1]["0"] == "12.0"


def test_captions_say_what_they_stand_on_and_t_star(built: Path) -> None:
    text = section(built, "Noise of the gradient")
    assert text.count("Below t* = 0.3 the posterior over the training set is one image and any "
                      "test of variance is empty.") == 3
    assert text.count("Stands on 9 of 9 planned files, at 100 % of the budget.") == 3
    assert "Stands on 18 of 18 planned files, at 50 %, 100 % of the budget." in text
    cosine = section(built, "Direction of the gradient")
    assert "single sample (CT) (first) and teacher edm (CD) (second)" in cosine
    assert "any test of variance is empty" in section(built, "Score error against sigma")


def test_same_input_same_bytes(built: Path) -> None:
    before = {p.name: p.read_bytes() for p in built.iterdir()}
    for path in built.iterdir():
        path.unlink()
    report.build(built.parent)
    assert {p.name: p.read_bytes() for p in built.iterdir()} == before


def test_sources_are_one_over_seeds(built: Path) -> None:
    rows = load.load(built.parent).instruments
    for kind in ("gradient_cosine", "trajectories"):
        assert rows[rows.kind == kind].identity.nunique() == 1
    assert "run\": \"edm\"" in rows[rows.kind == "gradient_cosine"].identity.iloc[0]
    assert records.renamed({"outside": {"run": "a"}, "teachers": ["a", "b"], "n": 1},
                           {"a": "edm"}) == {"outside": {"run": "edm"}, "teachers": ["edm", "b"],
                                             "n": 1}


def test_what_is_compared_and_which_way(built: Path) -> None:
    frame = tables.comparisons(load.load(built.parent))
    assert {"memorisation", "precision", "recall", "class_tv", "trajectory_error"} <= set(
        frame.metric)
    assert not set(frame.metric) & {"gradient_rho", "gradient_cosine", "slope_gradient",
                                    "gradient_rounding"}
    frame = frame[(frame.variant == "ct") & (frame.baseline == "cd")].set_index("metric")
    assert frame.effect["trajectory_error"] == pytest.approx(-np.log(2))
    assert frame.effect["recall"] == pytest.approx(0.1)  # less recall is worse
    assert frame.effect["precision"] == pytest.approx(-0.1)
    assert (frame.mean_variant["recall"], frame.mean_baseline["recall"]) == pytest.approx(
        (0.5, 0.6))
    assert "ct's one-step recall is 0.1 lower than cd's (0.5 against 0.6" in answer.sentence(
        frame.loc["recall"].copy().rename(None).pipe(lambda r: pd.Series(
            r.to_dict() | {"metric": "recall"})))
    summary = tables.summary(load.load(built.parent).of("digits"), "variant")
    column = next(c for c in summary.columns if c[0] == "recall")
    assert summary[column]["cd"][0] == pytest.approx(0.6)


def test_missing_files_are_named(built: Path, tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", variants=FEW)
    fake.instruments(folder)
    gone = file_of(folder, "ct", 1, "gradient_noise")
    gone.unlink()
    for name in FEW:
        for seed in range(3):
            file_of(folder, name, seed, "trajectories").unlink()
    report.build(folder)
    text = section(folder / "report", "Noise of the gradient")
    assert "Stands on 8 of 9 planned files (1 not measured yet), at 100 %" in text
    assert gone.name in section(folder / "report", "Provenance")
    assert section(folder / "report", "One trajectory, one output").strip() == (
        "No data yet: one trajectory, one output.")
    assert "## Direction" not in report.build(
        fake.write(tmp_path / "t", [0], variants=FEW)).with_suffix(".md").read_text()


def nothing(value: object) -> object:
    """A measured value with null for every number in it."""
    if isinstance(value, dict):
        return {k: nothing(v) for k, v in value.items()}
    return [None] * len(value) if isinstance(value, list) else None


@pytest.mark.parametrize("change", [
    lambda k, v: v if k in ("sigma", "N") else nothing(v), lambda k, v: None,
    lambda k, v: {"sigma": [], "law": 3}.get(k, "much"),
    lambda k, v: v[:2] if isinstance(v, list) else v])
def test_values_that_are_not_defined(tmp_path: Path, change: Callable) -> None:
    folder = fake.write(tmp_path / "s", seeds=[0, 1], variants=FEW)
    fake.instruments(folder, seeds=[0, 1])
    for file in folder.glob("runs/*/measures/*"):
        kind = file.name.split("-")[1]
        if kind in records.AXES:
            record = json.loads(file.read_text())
            fake.edit(file, **{k: change(k, v) for k, v in record.items()
                               if k not in ("id", "at", "images", "settings")})
    text = report.build(folder).with_suffix(".md").read_text()
    assert "## Noise of the gradient" in text and not re.search(r"\bnan\b", text)
    assert load.load(folder).problems == ()


def test_effective_samples_stand_beside_the_variance(built: Path) -> None:
    frame = pd.read_csv(built / "score_error.csv")
    assert frame.effective_samples.tolist()[:2] == pytest.approx(
        [1 + 99 * s / (1 + s) for s in fake.SIGMA[:2]])


def test_parts_leave_out_levels_that_are_not_defined(built: Path) -> None:
    study = load.load(built.parent)
    figure, _, ids = instruments.parts(study.of("digits"), dict.fromkeys(FEW, "#123456"))
    assert isinstance(figure, Figure) and ids is None
    black = figure.axes[0].collections[0].get_paths()[0].vertices
    assert black[:, 0].min() == pytest.approx(fake.SIGMA[1])
    assert len(rows_of(study.of("digits"), "gradient_noise")["file"].unique()) == 9


def test_rounding_that_is_large_beside_the_noise_is_told_beside_the_answer(
    built: Path, tmp_path: Path
) -> None:
    folder = fake.write(tmp_path / "grid", variants=FEW)
    fake.instruments(folder)
    for seed in range(3):
        for name, share in (("ct", 0.3 + 0.01 * seed), ("cd", 0.05)):
            file = file_of(folder, name, seed, "gradient_rounding")
            law = json.loads(file.read_text())["law"] | {"error_over_noise": share}
            fake.edit(file, law=law)
    report.build(folder)
    (told,) = [x for x in section(folder / "report", "Answer").splitlines() if "rounds much" in x]
    assert told.startswith("Half precision rounds") and ": ct 0.31. " in told and "cd" not in told
    assert "rounds much" not in section(built, "Answer")


def test_variants_without_noise_have_no_panel(tmp_path: Path) -> None:
    folder = fake.write(tmp_path / "s", [0], variants=FEW)
    fake.instruments(folder, [0])
    for file in folder.glob("runs/*/measures/*-gradient_noise-*"):
        fake.edit(file, dropout=[0.0] * 6)
    study = load.load(folder)
    figure, caption, _ = instruments.parts(study.of("digits"), palette(study))
    assert [a.get_title() for a in figure.axes] == ["ct"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["estimate of the score", "draw of $(t, x_t)$"]
    assert "Not drawn, all of theirs being that of the draw: cd, cd_exact." in caption


def test_probes_say_where_they_are_taken(built: Path) -> None:
    for title in ("Noise of the gradient", "Direction of the gradient"):
        text = section(built, title)
        assert text.count("Probes are taken at each variant's own weights") == 2
        assert text.count("the law's variance holds the spread between levels") == 2
    assert section(built, "Noise of the gradient").count("can leave [0, 1] by chance") == 2


def test_a_trajectory_error_names_its_path(built: Path) -> None:
    headings = table(section(built, "Metric against budget"))[0]
    assert "trajectory error, the teacher's path" in headings


def test_every_variant_looks_its_own(tmp_path: Path) -> None:
    many = {f"v{k}": fake.Made({"batch": 16 * (k + 1)}) for k in range(24)}
    colours = palette(load.load(fake.write(tmp_path / "s", [0], variants=FEW | many)))
    looks = [look(colours, n) for n in colours]
    assert len(set(looks)) == len(colours) == 27
    assert len({x.marker for x in looks[:12]}) == 12
    assert len({(x.colour, x.line) for x in looks}) == 27


@pytest.mark.parametrize(("vectors", "means"), [
    (False, "single-sample and the empirical estimate are both the empirical posterior mean"),
    (True, "single-sample and the analytic estimate are both the population's posterior mean")])
def test_whose_posterior_mean_is_estimated(tmp_path: Path, vectors: bool, means: str) -> None:
    study = load.load(fake.write(tmp_path / "s", [0], variants=FEW, vectors=vectors))
    _, caption, _ = probes.score(study.of("digits"), palette(study))
    assert means in caption
    assert ("one standard error of the mean" in caption) == vectors


# --- fixed points ---


def test_fixed_points_cost_nothing_and_match_nobody(line: Path) -> None:
    study = load.load(line.parent)
    assert ledger.audit(study) == [] and not len(study.missing)
    spend = ledger.spend(study).set_index("name")
    assert spend.images_total["ct_18"] == spend.seconds["ct_18"] == 0
    assert spend.images_total["ct_mlp"] == fake.IMAGES
    frame = tables.comparisons(study)
    frame = frame[frame.metric == "pushforward_w2"]
    fixed = {r["name"] for r in study.recipes if recipes.computed(r)}
    assert not (frame.variant.isin(fixed) & frame.baseline.isin(fixed)).any()
    row = frame[frame.role == "primary"].iloc[0]
    assert (row.variant, row.baseline, row.differs, row.matched) == (
        "ct_mlp", "ct_18", "objective", "no")
    assert row.effect == pytest.approx(np.mean(np.log([1.08, 1.1, 1.12])))
    assert np.isnan(row.low_pooled) and row.n == 3
    assert set(zip(frame.variant, frame.baseline, strict=True)) == {
        ("ct_mlp", "ct_18"), ("cd_mlp", "cd_18")}
    assert "none: computed" in section(line, "Variants")


def test_a_fixed_point_has_no_snapshot_on_the_way(tmp_path: Path) -> None:
    folder = fake.oracle_study(tmp_path / "s", seeds=[0])
    plan = json.loads((folder / "study.json").read_text())
    for run in plan["runs"]:
        run["measures"] += [m.replace("1.000", "0.500") for m in run["measures"]
                            if run["folder"].startswith("ct_18-")]
    fake.write_json(folder / "study.json", plan)
    assert not len(load.load(folder).missing)


def test_tables_of_fixed_points(line: Path) -> None:
    text = section(line, "Fixed points")
    rows = {r["fixed point"]: r for r in table(text)}
    assert (rows["ct_40"]["N"], rows["ct_40"]["K"]) == ("40", "1")
    assert rows["ct_40"]["W2"] == f"{40**-0.5:.4g}"
    assert rows["ct_40"]["between modes"] == f"{40**-0.5 / 3:.4g}"
    assert (rows["cd_18"]["method"], rows["cd_18"]["K"], rows["cd_18"]["solver"]) == (
        "CD", "–", "euler")
    assert rows["ct_18_k4"]["W2"] == f"{72**-0.5:.4g}"
    assert rows["ct_18_c0.3"]["distance"] == "pseudo huber (c0 0.3)"
    trained = table(text, 1)
    assert [(r["trained"], r["its fixed point"]) for r in trained] == [
        ("ct_mlp", "ct_18"), ("cd_mlp", "cd_18")]  # CD ends there whatever its distance
    assert trained[0]["W2 trained"].startswith(f"{1.1 * 18**-0.5:.4g} (")
    assert trained[0]["difference"].startswith("+")
    assert "Stands on 39 of 39 planned files" in text
    assert not (line / "curves-line.png").exists() or "ct_18" not in section(
        line, "Metric against budget").split("![")[1]


def test_series_of_fixed_points(line: Path) -> None:
    made = oracle.recipes_of(load.load(line.parent).of("line"))
    assert oracle.series(made, "discretization") == [
        ["ct_18", "ct_40", "ct_150", "ct_640"], ["cd_18", "cd_40", "cd_150"]]
    assert oracle.series(made, "score") == [["ct_18", "ct_18_k4", "ct_18_k16"]]
    assert oracle.series(made, "distance") == [["ct_18_c0.03", "ct_18_c0.3", "ct_18"]]


def test_fixed_points_that_nothing_is_trained_beside(tmp_path: Path) -> None:
    folder = fake.oracle_study(tmp_path / "s", seeds=[0])
    for file in folder.glob("runs/*_mlp-*/measures/*-pushforward-*"):
        file.unlink()
    text = report.build(folder).with_suffix(".md").read_text()
    assert "not answered yet: no seed of 1" in text
    assert "(2 not measured yet)" in section(folder / "report", "Fixed points")


# --- words ---


@pytest.mark.parametrize(("given", "text"), [
    ({"kind": "blend", "alpha": 0.25, "beta": 1, "run": "edm", "residual": "gaussian"},
     "0.25 exact posterior mean + 0.75 teacher edm, 1 of the single sample's noise, Gaussian "
     "(blend alpha 0.25, beta 1)"),
    ({"kind": "blend", "alpha": 1, "beta": 0},
     "exact posterior mean, no noise (blend alpha 1, beta 0)"),
    ({"kind": "k_sample", "n": 64, "shared": True},
     "self-normalised mean over 64 references, shared by the batch"),
    ({"kind": "posterior_k", "k": 4}, "mean of 4 posterior draws"),
    ({"kind": "windowed", "inside": {"kind": "teacher", "run": "edm"}, "t_low": 0.1,
      "t_high": 3.0, "outside": {"kind": "single_sample"}},
     "teacher edm (CD) for t in (0.1, 3.0], single sample (CT) elsewhere"),
    ({"kind": "own", "mu": 0.999, "ramp": 0.1},
     "own denoising head (average mu 0.999, grown in over 0.1 of training)"),
    ({"kind": "own"}, "own denoising head"),
    ({"kind": "denoising_head", "weight": 1.0, "labels": {"kind": "run", "run": "edm"}},
     "a denoising head beside f (weight 1.0, labels: the denoiser edm)"),
    ({"kind": "denoising_head", "weight": 1.0, "labels": {"kind": "data"}},
     "a denoising head beside f (weight 1.0, labels: the images)"),
    ({"kind": "ect", "q": 2.0, "k": 8.0, "b": 1.0, "stages": 8},
     "ECT's mapping r(t) (q 2.0, k 8.0, b 1.0, 8 stages)"),
    ({"kind": "continuous", "warm_up": 0.025, "c": 0.1},
     "continuous time (sCM; warm-up 0.025 of training, c 0.1)"),
    ({"kind": "fixed_point"}, "fixed point, computed and not trained"),
    ({"kind": "blend", "alpha": "x", "beta": 0, "run": "edm"}, "nan exact posterior mean + nan "
     "teacher edm, no noise (blend alpha nan, beta 0)"),  # of an edited file
    ({"kind": "l2_norm"}, "norm, not squared"), ({"kind": "none"}, "none")])
def test_factors_in_words(given: dict, text: str) -> None:
    assert words.factor_text(given) == text


def test_repeat_in_words(tmp_path: Path) -> None:
    made = {k: fake.Made({"repeat": n}) for k, n in (("ct", 1), ("cd", 1), ("four", 4))}
    rows, _ = words.recipes(load.load(fake.write(tmp_path / "s", [0], variants=made)).of("digits"))
    assert rows[2][1] == "repeat: 4 draws of x per x_t, their losses averaged"
