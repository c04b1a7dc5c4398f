"""The fit against scikit-learn's PCA and known mixtures, its cache, and studies on fitted data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from studies import read, write

from study import data, fitted, reference
from study.data import Dataset, Draws, to_float
from study.errors import StudyError
from study.factors import Analytic, Sigma, SingleSample
from study.lowrank import LowRankMixture
from study.probes import score_error
from study.run import main
from study.scores import Knowledge
from study.store import read_json
from study.subjects import Digits, FittedMixture

FITTED = FittedMixture(of=Digits())
STUDY = """\
question: Does it work where the density is known?
primary: {variant: ct, against: cd}
base:
  data: {kind: fitted_mixture, of: digits, components: 12, rank: 4, held_out: 100}
  network: {kind: unet, width: 4}
  budget: {images: 256}
  batch: 64
  discretization: {kind: fixed, N: 10}
sources:
  edm: {objective: denoising}
variants:
  ct: {score: single_sample}
  cd: {score: {kind: teacher, run: edm}}
  exact: {score: analytic}
measure:
  at: [1.0]
  fid: {extractor: digits-cnn, samples: 100, nfe: [1], draws: 1}
  map_error: {sigmas: 2, samples: 8}
  score_error: {sigmas: 3, samples: 64}
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of these tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "consistency-gap"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load(Digits())


@pytest.fixture(scope="module")
def endless() -> Dataset:
    return data.load(FITTED)


def content(mixture: LowRankMixture) -> bytes:
    return b"".join(part.numpy().tobytes() for part in mixture.tensors.values())


# --- the fit ---


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_one_component_is_scikit_learns_probabilistic_pca(rank: int, digits: Dataset) -> None:
    train, held_out = to_float(digits.train).double(), to_float(digits.held_out).double()
    expected = PCA(rank, svd_solver="full").fit(train.flatten(1)).score_samples(
        held_out.flatten(1)
    )
    found = fitted.fit(train, 1, rank).log_density(held_out, 0.0)
    assert found.numpy() == pytest.approx(expected, rel=1e-8)


def test_a_known_mixture_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, 20, 30, generator=generator, dtype=torch.float64)
    truth = LowRankMixture(
        (1, 5, 6),
        torch.cat([normal[0, :3], normal[1, :1]]),
        torch.linalg.qr(normal[:, 4:12].reshape(4, 4, 30).mT)[0].mT,
        torch.full((4, 4), 0.8, dtype=torch.float64),
        torch.full((4,), 0.2, dtype=torch.float64),
        torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log(),
    )
    found = fitted.fit(truth.sample(8000, generator), 4, 4)
    assert found.log_weights.exp().sort().values.numpy() == pytest.approx(
        [0.1, 0.2, 0.3, 0.4], abs=0.02
    )
    fresh = truth.sample(4000, generator)
    lost = (truth.log_density(fresh, 0.0) - found.log_density(fresh, 0.0)).double()
    # Kullback-Leibler divergence, nats: about half the number of parameters / 8000
    parameters = 4 * (30 + 30 * 4 + 2)
    assert 0 < lost.mean() < 2 * parameters / 2 / 8000


def test_the_same_images_give_the_same_bits(digits: Dataset) -> None:
    x = to_float(digits.train)
    threads = torch.get_num_threads()
    first = content(fitted.fit(x, 20, 4))
    torch.set_num_threads(2)
    try:
        second = content(fitted.fit(x, 20, 4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert first == second != content(fitted.fit(x[:-1], 20, 4))


def test_it_holds_for_images_that_it_has_not_seen(digits: Dataset, endless: Dataset) -> None:
    train, held_out = fitted.likelihoods(digits, endless.density)
    single = fitted.likelihoods(digits, fitted.fit(to_float(digits.train), 1, FITTED.rank))
    assert train > held_out > single[1] + 0.3  # nats per dimension
    assert train - held_out < 0.4
    drawn = endless.held_out.flatten(1).double()
    inside = float(endless.density.log_density(drawn, 0.0).mean() / 64)
    assert abs(held_out - inside) < 0.6  # real images are about as likely as its own


def test_images_that_are_all_the_same_keep_a_density() -> None:
    mixture = fitted.fit(torch.zeros(5, 1, 6, 6), 1, 3)
    assert mixture.stds.tolist() == [fitted.FLOOR]
    assert mixture.log_density(torch.zeros(1, 1, 6, 6), 0.0).isfinite().all()
    with pytest.raises(StudyError, match="data.components: 6 given for 5"):
        fitted.fit(torch.zeros(5, 1, 6, 6), 6, 3)


# --- the cache ---


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty"])
def test_a_torn_cache_is_fitted_again(harm: str, digits: Dataset, cache: Path) -> None:
    first = fitted.density(digits, 5, 2)
    (path,) = (p for p in cache.glob("fitted-*.npz") if fitted.read(p).means.shape[0] == 5)
    whole = path.read_bytes()
    torn = {"cut": whole[:-9], "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
            "empty": b""}[harm]  # fmt: skip
    path.write_bytes(torn)
    again = fitted.density(digits, 5, 2)
    assert content(again) == content(first) and again.shape == (1, 8, 8)
    assert path.read_bytes() == whole


def test_a_fit_is_made_once_and_then_read(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, fit = [], fitted.fit
    monkeypatch.setattr(fitted, "fit", lambda *a: made.append(a[1:]) or fit(*a))
    with ThreadPoolExecutor(3) as pool:
        both = list(pool.map(lambda _: fitted.density(digits, 7, 2), range(3)))
    assert made == [(7, 2)] and len({content(m) for m in both}) == 1
    fitted.density(digits, 7, 3)
    fitted.density(digits, 8, 2)
    assert made == [(7, 2), (7, 3), (8, 2)]


def test_without_a_cache_folder_it_warns_and_fits(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = fitted.density(digits, 5, 2)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="can't be kept"):
        assert content(fitted.density(digits, 5, 2)) == content(kept)


# --- the data set ---


def test_endless_and_finite_data_have_the_shape_of_images(endless: Dataset) -> None:
    assert endless.images and endless.shape == (1, 8, 8) and endless.train is None
    assert endless.held_out.shape == (400, 1, 8, 8) and endless.held_out.dtype == torch.float32
    batch = Draws(endless, 0, "student", 0)(0, 600)
    assert batch.x.shape == batch.z.shape == (600, 1, 8, 8)
    assert len(batch.x.flatten(1).unique(dim=0)) == 600
    assert endless.std == pytest.approx(float(batch.x.double().std()), rel=0.01)
    finite = data.load(FittedMixture(of=Digits(), samples=50, held_out=30))
    assert finite.train.shape == (50, 1, 8, 8) and finite.held_out.shape == (30, 1, 8, 8)
    assert finite.std == float(finite.train.double().std())
    moved = finite.to(torch.device("cpu"))
    assert content(moved.density) == content(endless.density)
    assert data.load(FITTED).digest == endless.digest
    others = [finite, data.load(FittedMixture(of=Digits(), components=20))]
    assert len({endless.digest, *(o.digest for o in others)}) == 3


def test_references_of_endless_data_are_one_draw_of_the_population(endless: Dataset) -> None:
    parts = ("train", "held_out")
    first, second = ({p: reference.images(endless, 300, p) for p in parts} for _ in range(2))
    for part in parts:
        assert first[part].shape == (300, 1, 8, 8)
        assert torch.equal(first[part], second[part])
    assert torch.cdist(first["train"].flatten(1), first["held_out"].flatten(1)).min() > 0


@pytest.fixture(scope="module")
def errors(endless: Dataset) -> dict[str, np.ndarray]:
    """Score error of single samples at eight levels."""
    result = score_error(SingleSample(), Knowledge(), endless, Sigma(data=1.0), 8, 1000)
    assert result["known"] and result["t_star"] is None and result["dimension"] == 64
    return {k: np.array(v) for k, v in result.items() if isinstance(v, list)}


def test_the_variance_of_single_samples_is_the_posteriors(errors: dict[str, np.ndarray]) -> None:
    """At every level; from noise t = 0.002, where it is d t^2, to the data's own variance."""
    gap = errors["variance"] - errors["posterior_variance"]
    assert (np.abs(gap) < 4 * errors["variance_se"]).all()
    assert (errors["variance_se"] < 0.05 * errors["posterior_variance"]).all()
    assert errors["posterior_variance"][0] == pytest.approx(64 * 0.002**2, rel=0.01)
    assert (np.diff(errors["posterior_variance"]) > 0).all()


def test_single_samples_are_unbiased_and_lose_the_posterior_variance(
    errors: dict[str, np.ndarray],
) -> None:
    # at t = 0.002 x_t itself is rounded to float32, 3e-8 of its size
    assert (np.abs(errors["bias2"]) < 4 * errors["bias2_se"] + 1e-9).all()
    loss = errors["held_out_loss"]
    error = np.hypot(errors["held_out_loss_se"], errors["variance_se"])
    assert (np.abs(loss - errors["variance"]) < 4 * error).all()


def test_the_analytic_score_has_no_error_and_a_finite_sample_has(endless: Dataset) -> None:
    sigma = Sigma(min=0.1, max=10.0, data=1.0)
    exact = score_error(
        Analytic(), Knowledge(density=endless.density), endless, sigma, 3, 100
    )
    assert exact["variance"] == exact["bias2"] == [0.0] * 3
    finite = data.load(FittedMixture(of=Digits(), samples=100))
    off = score_error(SingleSample(), Knowledge(), finite, sigma, 3, 400)
    assert off["bias2"][1] > 4 * off["bias2_se"][1] > 0
    assert off["t_star"] > 0.1


# --- studies ---


def test_a_bare_name_is_short_for_its_kind_and_every_field_enters_the_id(tmp_path: Path) -> None:
    def ids(text: str) -> set[str]:
        return {r.id for r in read(tmp_path, text).runs}

    (given,) = {r.recipe.factors.data for r in read(tmp_path, STUDY).runs}
    assert given == FittedMixture(of=Digits(), components=12, rank=4, held_out=100)
    assert ids(STUDY) == ids(STUDY.replace("of: digits", "of: {kind: digits}"))
    text = STUDY.split("measure:")[0].replace("primary", "# primary")
    fashion = text.replace("of: digits", "of: fashion_mnist")
    elsewhere = text.replace("of: digits", "of: {kind: fashion_mnist, root: somewhere}")
    assert ids(fashion) == ids(elsewhere)
    others = [fashion] + [
        text.replace(old, new)
        for old, new in (
            ("rank: 4", "rank: 5"), ("components: 12", "components: 13"),
            ("held_out: 100", "held_out: 101"), ("held_out: 100", "held_out: 100, samples: 9"),
        )
    ]  # fmt: skip
    assert len(set.union(ids(text), *map(ids, others))) == len(ids(text)) * (1 + len(others))


@pytest.mark.parametrize(("old", "new", "told"), [
    ("of: digits, ", "", "needs 'of'"),
    ("of: digits", "of: digit", "base.data.of: kind 'digit'; did you mean 'digits'"),
    ("of: digits", "of: mixture", "base.data.of: kind 'mixture'; allowed: digits, fashion_mnist"),
    ("of: digits", "of: {kind: digits, root: x}", "base.data.of"),
    ("rank: 4", "rank: 64", "base.data.rank"),
    ("components: 12", "components: 0", "base.data.components"),
    ("held_out: 100", "held_out: 99", r"100 samples.*99 images in held_out.*reference: \[train\]"),
    ("held_out: 100", "held_out: 100, samples: 80", "100 samples.*80 images"),
    ("of: digits", "of: fashion_mnist", "not an extractor for fashion_mnist"),
    ("score: analytic", "score: empirical", "finite data"),
    ("  map_error: {sigmas: 2", "  sliced_wasserstein: {projections: 2", "mixture of vectors"),
])  # fmt: skip
def test_what_means_nothing_is_refused(old: str, new: str, told: str, tmp_path: Path) -> None:
    assert old in STUDY
    with pytest.raises(StudyError, match=f"(?s){told}"):
        read(tmp_path, STUDY.replace(old, new))


def test_a_study_runs_end_to_end(tmp_path: Path) -> None:
    path = write(tmp_path, STUDY)
    assert main([str(path), "--results", str(tmp_path / "results"), "--workers", "0"]) == 0
    runs = {p.name.split("-")[0]: p for p in (tmp_path / "results/small/runs").iterdir()}
    assert set(runs) == {"edm", "ct", "cd", "exact"}
    found = {
        name: {m["settings"]["kind"]: m for m in map(read_json, p.glob("measures/*.json"))}
        for name, p in runs.items()
    }
    for name, kinds in found.items():
        assert kinds["fid"]["value"] > kinds["fid"]["floor"] > 0
        with Image.open(runs[name] / "samples.png") as image:
            assert image.width == 320
        if name != "edm":
            assert kinds["map_error"]["value"] > 0 and kinds["score_error"]["known"]
    assert found["exact"]["score_error"]["bias2"] == [0.0] * 3
    assert min(found["cd"]["score_error"]["bias2"]) > 0
    assert str(tmp_path) not in json.dumps(read_json(runs["ct"] / "run.json"))


def test_the_command_prints_likelihoods_and_writes_a_picture(
    digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.png"
    assert fitted.main(["digits", "--components", "9", "--rank", "3", "--png", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = {line.split(",")[0]: [float(v) for v in line.split()[-2:]] for line in out[1:3]}
    assert rows["mixture of 9"][1] > rows["one Gaussian"][1]
    assert rows["mixture of 9"][0] > rows["mixture of 9"][1]
    with Image.open(path) as image:
        shown = np.asarray(image.convert("L"))[::3, ::3]  # 10 by 10, each in a frame of 1
    blocks = shown.reshape(10, 10, 10, 10).swapaxes(1, 2)[:, :, 1:-1, 1:-1]
    real = (blocks[:, :5] == digits.held_out[:50, 0].unflatten(0, (10, 5)).numpy()).all()
    assert real and len({block.tobytes() for row in blocks for block in row}) > 90
    assert fitted.main(["digits", "--components", "998"]) == 2
    assert "998 given for 997" in capsys.readouterr().err


def test_help_says_what_the_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fitted.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "Fits a mixture" in told and "exit status" not in told
    for option in ("components COMPONENTS Gaussians", "rank RANK of each", "png PNG the picture"):
        assert f"--{option}" in told
