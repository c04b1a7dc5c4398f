"""A study file resolves to the runs it means, and every mistake is one StudyError."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import TWO_MODES, read, replaced, write

from study.errors import StudyError
from study.factors import (
    L2,
    Ema,
    Euler,
    Fixed,
    FromRun,
    Frozen,
    Heun,
    Progressive,
    RAdam,
    Random,
    SingleSample,
    Stopgrad,
    Teacher,
    Uniform,
    UniformGrid,
)
from study.meaning import references
from study.resolve import load
from study.run import main
from study.spec import Study

GRID = Path(__file__).parents[1] / "sweeps" / "grid.yaml"
DIGITS = TWO_MODES.replace(
    "data: {kind: mixture, means: [[-1.0], [1.0]], std: 0.2, samples: 500}", "data: digits"
).split("measure:")[0].replace("primary", "#")  # nothing measured, nothing compared


def by_name(study: Study, name: str) -> list:
    """The runs of one variant or source."""
    return [r for r in study.runs if r.recipe.name == name]


def test_grid_means_what_the_readme_says() -> None:
    study = load(GRID)
    assert {r.recipe.name for r in study.runs} == {
        "ct", "cd", "cd_exact", "ct_warm", "cd_warm", "born_again", "self_pretrain", "ct_again",
        "edm", "edm_half", "ct_first"}  # fmt: skip
    assert study.seeds == (0, 1, 2)
    ct, cd = by_name(study, "ct")[0], by_name(study, "cd")[0]
    assert isinstance(ct.recipe.factors.score, SingleSample)
    assert isinstance(cd.recipe.factors.score, Teacher)
    # CT and CD differ in the score and in nothing else
    assert ct.recipe.factors == _with(cd.recipe.factors, score=ct.recipe.factors.score)
    warm = by_name(study, "ct_warm")[0]
    assert warm.recipe.factors.init == FromRun(run="edm")
    assert by_name(study, "born_again")[0].recipe.factors.target == Frozen(run="ct_first")
    # a charged run trains on what is left of the budget
    pretrained, half = by_name(study, "self_pretrain")[0], by_name(study, "edm_half")[0]
    budget = ct.recipe.factors.budget.images
    assert half.recipe.factors.budget.images == budget // 2
    assert pretrained.recipe.factors.budget.images + half.recipe.factors.budget.images == budget
    assert pretrained.charged == (half.id,)


def _with(factors: object, **changes: object) -> object:
    import msgspec

    return msgspec.structs.replace(factors, **changes)


def test_sources_stand_before_the_runs_that_read_them(tmp_path: Path) -> None:
    text = replaced("  edm: {objective: denoising}",
                    "  second: {from: ct, init: {run: first}}\n"
                    "  first: {from: ct, init: {run: edm}}\n  edm: {objective: denoising}")
    study = read(tmp_path, text)
    position = {r.id: i for i, r in enumerate(study.runs)}
    for run in study.runs:
        assert all(position[i] < position[run.id] for i in run.refs.values())
        assert set(run.refs) == set(references(run.recipe.factors))


def test_layers_merge_in_their_order(tmp_path: Path) -> None:
    text = TWO_MODES + "cells:\n  a: {batch: 32}\n  b: {optimizer: {lr: 5e-4}}\n"
    text = text.replace("  cd: {", "  ct_low: {from: ct, dropout: 0.25}\n  cd: {")
    study = read(tmp_path, text, ("base.optimizer.eps=1e-6",))
    factors = {(r.recipe.name, r.recipe.cell): r.recipe.factors for r in study.runs}
    assert factors["ct", "a"].batch == 32 and factors["ct", "b"].batch == 64
    assert factors["ct", "b"].optimizer.lr == 5e-4 and factors["ct", "b"].optimizer.eps == 1e-6
    assert factors["ct", "a"].optimizer.lr == 1e-3
    assert factors["ct_low", "a"].dropout == 0.25 and factors["ct", "a"].dropout == 0


def test_another_kind_replaces_and_never_merges(tmp_path: Path) -> None:
    text = replaced("{score: single_sample}", "{discretization: {kind: doubling, s1: 40}}")
    ct = by_name(read(tmp_path, text), "ct")[0].recipe.factors
    assert (ct.discretization.s0, ct.discretization.s1) == (10, 40)


def test_the_same_kind_merges_also_where_it_is_the_default(tmp_path: Path) -> None:
    text = replaced("batch: 64", "batch: 64\n  optimizer: {lr: 2e-3}").replace(
        "{score: single_sample}", "{optimizer: {kind: adam, eps: 1e-6}}")
    adam = by_name(read(tmp_path, text), "ct")[0].recipe.factors.optimizer
    assert (adam.lr, adam.eps) == (2e-3, 1e-6)


def test_a_name_may_hold_dots(tmp_path: Path) -> None:
    text = replaced("  cd: {", "  cd.v2: {").replace("against: cd", "against: cd.v2")
    study = read(tmp_path, text)
    assert by_name(study, "cd.v2")


def test_from_means_a_variant_of_the_study_before_a_preset(tmp_path: Path) -> None:
    text = replaced("ct: {score: single_sample}",
                    "ct: {score: empirical}\n  a: {from: ct}\n  b: {from: preset:ct}")
    study = read(tmp_path, text)
    kinds = {n: by_name(study, n)[0].recipe.factors.score.__struct_config__.tag for n in "ab"}
    assert kinds == {"a": "empirical", "b": "single_sample"}


def test_the_pair_of_2023_has_its_published_constants(tmp_path: Path) -> None:
    text = replaced("ct: {score: single_sample}", "ct: {from: preset:cm_ct}").replace(
        "cd: {score: {kind: teacher, run: edm}}", "cd: {from: preset:cm_cd}")
    study = read(tmp_path, text)
    ct, cd = (by_name(study, name)[0].recipe.factors for name in ("ct", "cd"))
    for one in (ct, cd):
        assert one.optimizer == RAdam(lr=4e-4, betas=(0.9, 0.999))
        assert (one.law, one.weighting, one.distance) == (UniformGrid(), Uniform(), L2())
        assert one.dropout == 0
    assert (cd.score, cd.init) == (Teacher(run="edm"), FromRun(run="edm"))
    assert (cd.solver, cd.target, cd.discretization) == (Heun(), Stopgrad(), Fixed(N=18))
    assert (ct.score, ct.init, ct.solver) == (SingleSample(), Random(), Euler())
    assert ct.target == Ema(mu=0.9, s0=2)
    assert ct.discretization == Progressive(s0=2, s1=150)
    differ = {f for f in ct.__struct_fields__ if getattr(ct, f) != getattr(cd, f)}
    assert differ == {"score", "init", "solver", "target", "discretization"}


def test_names_that_mean_the_same_are_one_run(tmp_path: Path) -> None:
    text = replaced("  ct: {score: single_sample}",
                    "  ct: {score: single_sample}\n  twin: {from: ct}")
    study = read(tmp_path, text)
    assert by_name(study, "ct")[0].id == by_name(study, "twin")[0].id
    assert len(study.unique) == len(study.runs) - len(study.seeds)


def test_score_error_is_asked_once_for_each_estimate(tmp_path: Path) -> None:
    text = TWO_MODES + "  score_error: {}\n"
    text = text.replace("  cd: {", "  warm: {from: ct, init: {run: edm}}\n  cd: {")
    asked = [(r.recipe.name, r.seed) for r in read(tmp_path, text).runs for m in r.measures
             if m.record["kind"] == "score_error"]
    # single samples once for the data; each seed's teacher once
    assert asked == [("ct", 0), ("cd", 0), ("cd", 1)]


BAD = {
    "misspelt factor": (replaced("  batch:", "  bacth:"), "base.bacth.*'batch'"),
    "misspelt kind": (replaced("single_sample", "single_sampel"), "ct.score.*'single_sample'"),
    "misspelt key": (replaced("seeds:", "sedes:"), "sedes.*'seeds'"),
    "misspelt field": (replaced("N: 10", "M: 10"), "base.discretization.M"),
    "missing field": (replaced("kind: fixed, N: 10", "kind: fixed"), "discretization.*'N'"),
    "wrong type": (replaced("batch: 64", "batch: many"), "base.batch.*'many'"),
    "number as text": (replaced("std: 0.2", "std: x"), "base.data"),
    "duplicate key": (TWO_MODES + "seeds: [3]\n", "seeds"),
    "duplicate by a dot": (replaced("  batch: 64", "  batch: 64\n  budget.images: 64"), "images"),
    "no teacher": (replaced("kind: teacher, run: edm", "kind: teacher"), "cd.score.*'run'"),
    "unknown teacher": (replaced("run: edm", "run: emd"), "cd.score.run.*'edm'"),
    "variant as source": (replaced("run: edm", "run: ct"), "source twin"),
    "teacher that is no denoiser": (
        replaced("{objective: denoising}", "{objective: consistency}"), "denoising expected"),
    "analytic on digits": (
        DIGITS.replace("single_sample", "analytic"), "analytic needs a known density"),
    "empirical without end": (
        replaced(", samples: 500", "").replace("single_sample", "empirical"), "finite data"),
    "cycle of sources": (
        replaced("{objective: denoising}", "{objective: denoising, init: {run: edm}}"), "cycle"),
    "cycle of from": (replaced("{score: single_sample}", "{from: cd}").replace(
        "cd: {", "cd: {from: ct, "), "cycle"),
    "negative": (replaced("std: 0.2", "std: -0.2"), "base.data"),
    "infinite": (replaced("std: 0.2", "std: .inf"), "not a finite number"),
    "huge exponent": (replaced("std: 0.2", "std: 1e400"), "not a finite number"),
    "not a number": (replaced("std: 0.2", "std: .nan"), "not a finite number"),
    "empty seeds": (replaced("seeds: [0, 1]", "seeds: []"), "seeds"),
    "seed twice": (replaced("seeds: [0, 1]", "seeds: [1, 1]"), "twice"),
    "no variants": (TWO_MODES.split("variants:")[0], "variants"),
    "empty means": (replaced("[[-1.0], [1.0]]", "[]"), "base.data"),
    "ragged means": (replaced("[[-1.0], [1.0]]", "[[-1.0], [1.0, 2.0]]"), "one dimension"),
    "broken batch": (replaced("images: 1280", "images: 1281"), "whole batches"),
    "overcharged": (replaced("single_sample}", "single_sample, charge: [edm]}"), "charge"),
    "no such preset": (replaced("{score: single_sample}", "{from: preset:cdd}"), "'preset:cd'"),
    "primary of no variant": (replaced("against: cd", "against: dc"), "allowed: cd, ct"),
    "compare of no variant": (TWO_MODES + "compare: [[cd, ctt]]\n", "compare.0: .*mean 'ct'"),
    "compare of a source": (TWO_MODES + "compare: [[edm, ct]]\n", "compare.0: no variant 'edm'"),
    "compare with itself": (TWO_MODES + "compare: [[cd, cd]]\n", "compare.0: 'cd' twice"),
    "compare of three": (TWO_MODES + "compare: [[cd, ct, cd]]\n", "compare: .*pairs expected"),
    "compare that is no list": (TWO_MODES + "compare: cd\n", "compare: 'cd' given"),
    "compare twice": (TWO_MODES + "compare: [[cd, ct], [ct, cd]]\n", "compare.1: .*named twice"),
    "compare without a common seed": (
        replaced("ct: {score: single_sample}", "ct: {score: single_sample, seeds: [1]}")
        .replace("run: edm}}", "run: edm}, seeds: [0]}").replace("primary", "#")
        + "compare: [[cd, ct]]\n", "compare.0: .*share no seed"),
    "primary where nothing compares": (
        TWO_MODES.split("measure:")[0] + "measure: {score_error: {sigmas: 4, samples: 64}}",
        "nothing that compares variants is; measure it, or say primary: null",
    ),
    "unmeasured primary": (replaced("metric: sliced_wasserstein", "metric: fid"), "not measured"),
    "fid of vectors": (TWO_MODES + "  fid: {extractor: digits-cnn, samples: 9}\n", "needs images"),
    "unet on vectors": (replaced("{kind: mlp, width: 16, depth: 1}", "unet"), "needs images"),
    "ddpmpp on vectors": (
        replaced("{kind: mlp, width: 16, depth: 1}", "ddpmpp"), "a ddpmpp needs images"),
    "ema not kept": (replaced("draws: 1", "draws: 1, ema: [0.07]"), "ema 0.07"),
    "name with a slash": (replaced("  ct: {", "  ../ct: {"), "name"),
    "name that is no text": (replaced("  ct: {", "  2: {"), "not text"),
    "variant against its cell": (
        TWO_MODES.replace("{score: single_sample}", "{batch: 32}") + "cells: {a: {batch: 64}}\n",
        "cell 'a' sets this key"),
    "the same update twice": (replaced("at: [0.5, 1.0]", "at: [0.5, 0.51]"), "same update"),
    "the same three decimals": (
        replaced("at: [0.5, 1.0]", "at: [0.3001, 0.3004]").replace(": 1280", ": 640000"),
        "three decimals"),
    "from a list": (replaced("{score: single_sample}", "{from: [cd]}"), "one name"),
    "charge of lists": (replaced("single_sample}", "single_sample, charge: [[edm]]}"), "charge"),
    "charge by a source": (
        replaced("  edm: {", "  pre: {objective: denoising, budget: {share: 0.1}}\n"
                 "  edm: {charge: [pre], "), "only variants pay"),
    "kind in a list": (replaced("kind: mlp", "kind: [mlp]"), "base.network"),
    "mid below sigma": (replaced("draws: 1", "mid: 0.001"), "mid"),
    "endless width": (replaced("width: 16", "width: 100000000000000000000000"), "width"),
    "vanishing rho": (replaced("batch: 64", "batch: 64\n  sigma: {rho: 1e-300}"), "sigma.rho"),
    "teacher of other levels": (
        replaced("{objective: denoising}", "{objective: denoising, sigma: {max: 1.0}}"), "levels"),
    "extractor unknown": (
        DIGITS + "measure: {fid: {extractor: digits-cmm, samples: 9}}\n",
        "measure.fid.*'digits-cnn'"),
    "a measured score without its teacher": (
        TWO_MODES + "  gradient_cosine: {against: {kind: blend, alpha: 0.5, beta: 0}}\n",
        "gradient_cosine.against.*needs `run`"),
    "a measured score of an unknown source": (
        TWO_MODES + "  gradient_slopes: {against: {kind: teacher, run: edn}}\n",
        "gradient_slopes.*no source 'edn'"),
    "a measured score that is a word too many": (
        TWO_MODES + "  gradient_cosine: {against: empiric}\n", "did you mean 'empirical'"),
    "a teacher twice": (
        TWO_MODES + "  trajectories: {teachers: [edm, edm]}\n", "two different ones"),
    "an N twice": (
        TWO_MODES + "  gradient_slopes: {against: empirical, N: [20, 20]}\n", "one twice"),
    "own without a head": (replaced("single_sample", "own"), "add auxiliary: denoising_head"),
    "a window the wrong way round": (
        replaced("single_sample", "{kind: windowed, inside: single_sample, outside: empirical, "
                 "t_low: 2, t_high: 1}"), "window .* holds no level"),
    "no draws": (replaced("single_sample", "{kind: posterior_k, k: 0}"), "0 given.*>= 1"),
    "more references than points": (
        replaced("single_sample", "{kind: k_sample, n: 501}"), "501 references.* 500"),
    "heun with noise": (
        replaced("{score: single_sample}", "{score: {kind: posterior_k, k: 2}, solver: heun}"),
        "use solver: euler"),
    "a fixed point of finite data": (
        replaced("{score: single_sample}", "{objective: fixed_point}"), "endless one-dimensional"),
    "too many draws for a fixed point": (
        replaced(", samples: 500", "").replace(
            "{score: single_sample}",
            "{objective: fixed_point, score: {kind: posterior_k, k: 1000}}"), "smaller k"),
    "a denoiser that is never read": (
        replaced("single_sample", "{kind: blend, alpha: 1, beta: 1, run: edm}"), "never read"),
    "a patch that does not divide": (
        DIGITS.replace("{kind: mlp, width: 16, depth: 1}", "{kind: unet, patch: 3}"),
        "does not divide"),
    "attention where there is no resolution": (
        DIGITS.replace("{kind: mlp, width: 16, depth: 1}", "ddpmpp"),
        r"attention at \[16\]; on 8 x 8 images it has \[8, 4, 2\]"),
    "two folders of one name": (
        TWO_MODES.split("measure:")[0].replace("primary", "#")
        + "cells: {a: {data: {kind: images, root: x}}, b: {data: {kind: images, root: y}}}\n",
        "both called 'images'"),
    "a grid that would shrink": (
        replaced("{kind: fixed, N: 10}", "{kind: progressive, s0: 20, s1: 10}"),
        "discretization: s0 20 is above s1 . 1 = 11"),
    "not a mapping": ("- 1\n", "mapping"),
    "not yaml": ("a: [1\n", "line"),
    "a tag that would build an object": ("base: !!python/object/apply:os.getcwd []\n", "tag"),
    "a value inside itself": ("base: &a {data: *a}\n", "nested"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_study_error_and_nothing_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, told = BAD[case]
    path = write(tmp_path, text)
    with pytest.raises(StudyError, match=f"(?s){told}") as error:
        load(path)
    assert str(path) in str(error.value) or "preset" in str(error.value)
    assert main([str(path), "--results", str(tmp_path / "results")]) == 2
    assert not (tmp_path / "results").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_file_and_a_bad_set_are_study_errors(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot be read"):
        load(tmp_path / "none.yaml")
    path = write(tmp_path)
    for bad in ("seeds", "seeds=[", ".=1", "base.batch.x=1"):
        with pytest.raises(StudyError):
            load(path, (bad,))


def test_a_variant_may_have_fewer_seeds(tmp_path: Path) -> None:
    fewer = replaced("ct: {score: single_sample}", "ct: {score: single_sample, seeds: [1]}")
    study = read(tmp_path, fewer)
    planned = [(r.recipe.name, r.seed) for r in study.runs]
    assert planned == [("edm", 0), ("cd", 0), ("edm", 1), ("ct", 1), ("cd", 1)]
    assert {r.id for r in study.runs} < {r.id for r in read(tmp_path).runs}
    for text, message in (
        (fewer.replace("[1]}", "[2]}"), r"variants.ct.seeds: \[2\] has none of the study's"),
        (fewer.replace("run: edm}}", "run: edm}, seeds: [0]}"), "primary.against: cd has seeds"),
        (fewer.replace("[1]}", "[1, 1]}"), "variants.ct.seeds: .* names one twice"),
        (
            replaced("objective: denoising}", "objective: denoising, seeds: [0]}"),
            "sources.edm.seeds: without 1, with which 'cd' needs it",
        ),
    ):
        with pytest.raises(StudyError, match=message):
            read(tmp_path, text)


def test_an_average_that_forgets_is_the_student(tmp_path: Path) -> None:
    twin = replaced("ct: {score: single_sample}", "ct: {target: {kind: ema, mu: 0.0}}")
    assert {r.id for r in read(tmp_path, twin).runs} == {r.id for r in read(tmp_path).runs}


def test_comparisons_beside_the_primary_change_no_run(tmp_path: Path) -> None:
    plain, named = read(tmp_path), read(tmp_path, TWO_MODES + "compare: [[cd, ct]]\n")
    assert (plain.compare, named.compare) == ((), (("cd", "ct"),))
    assert [r.id for r in plain.runs] == [r.id for r in named.runs]
    assert named.as_json() == plain.as_json() | {"compare": (("cd", "ct"),)}


@pytest.mark.parametrize(("change", "told"), [
    ("base.augment=flipp", "base.augment: 'flipp' given; did you mean 'flip'"),
    ("base.precision=half", "base.precision: 'half' given; allowed: bfloat16, float16, float32"),
    ("base.weights_ema=0.1", r"base.weights_ema: 0.1 given; a list expected: \[0.1\]"),
    ("measure.fid={extractor: digits-cnn, samples: 9, reference: [trian]}",
     r"measure.fid.reference\[0\]: 'trian' given; did you mean 'train'"),
    ("variants.ct.score={kind: blend, alpha: 1, beta: 1, residual: gauss}",
     "variants.ct.score.residual: 'gauss' given; did you mean 'gaussian'"),
    ("dropout=-1", "dropout: no such key; did you mean 'base.dropout'"),
    ("repeat=0", "repeat: no such key; did you mean 'base.repeat'"),
    ("optimizer.lr=1", "optimizer: no such key; did you mean 'base.optimizer'"),
    ("fid.samples=9", "fid: no such key; did you mean 'measure.fid'"),
    ("margin=0", "margin: no such key; did you mean 'primary.margin'"),
    ("sead=0", "sead: no such key; did you mean 'seeds'"),
])  # fmt: skip
def test_one_of_a_few_words_is_told_with_the_others(
    change: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match=told):
        read(tmp_path, sets=(change,))
