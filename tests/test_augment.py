"""Mirrored images: which are, and that the law that scores consult is the one x is drawn from."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from analysis import ledger
from analysis.load import load as load_results
from study import data, probes, reference, run
from study.data import Dataset, Draws, to_float
from study.errors import StudyError
from study.factors import Empirical, KSample, Sigma, SingleSample
from study.posterior import law_of
from study.resolve import load
from study.scores import Knowledge, Point, estimate
from study.subjects import Digits

N = 300
CUTS = [7, 64, 128, 511, 512, 513, 1000, 1280]


def numbered(flip: bool = True) -> Dataset:
    """Images of two pixels, i and i + 1/2; mirrored, the half comes first."""
    first = torch.arange(N, dtype=torch.float32)
    train = torch.stack([first, first + 0.5], 1).view(N, 1, 1, 2)
    return Dataset(train, train, (1, 1, 2), 1.0, "", flip=flip)


def tiny(flip: bool = True) -> Dataset:
    """20 colour images of 3 x 3 random pixels."""
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(256, (20, 3, 3, 3), generator=generator, dtype=torch.uint8)
    return Dataset(train, train, (3, 3, 3), 1.0, "", flip=flip)


def drawn(dataset: Dataset, cuts: list[int], *address: object) -> list[Tensor]:
    """x, z and u of consecutive batches that end at the cuts."""
    draws = Draws(dataset, *(address or (0, "student", 0)))
    batches = [draws(a, b - a) for a, b in pairwise([0, *cuts])]
    return [torch.cat([getattr(b, name) for b in batches]) for name in ("x", "z", "u")]


def mirrored(x: Tensor) -> Tensor:
    """Which rows of numbered images are."""
    return x[:, 0, 0, 0] > x[:, 0, 0, 1]


def test_the_flips_are_addressed_by_image_whatever_the_batch() -> None:
    small, odd = drawn(numbered(), list(range(64, 1281, 64))), drawn(numbered(), CUTS)
    assert all(torch.equal(a, b) for a, b in zip(small, odd, strict=True))
    late = Draws(numbered(), 0, "student", 0)(1000, 280)  # a resumed run
    assert torch.equal(late.x, odd[0][1000:])


def test_the_rest_of_the_stream_is_as_without() -> None:
    plain, flipped = drawn(numbered(flip=False), CUTS), drawn(numbered(), CUTS)
    assert torch.equal(plain[0], flipped[0].sort(-1).values)  # the same images in the same order
    assert torch.equal(plain[1], flipped[1]) and torch.equal(plain[2], flipped[2])
    assert not mirrored(plain[0]).any()


def test_half_are_mirrored_and_not_the_same_half_every_epoch() -> None:
    n = 40 * N
    x = drawn(numbered(), [n])[0]
    turned = mirrored(x)
    assert abs(turned.double().mean() - 0.5) < 4 * 0.5 / n**0.5
    epochs = turned.view(40, N).gather(1, x.amin(3).view(40, N).argsort(1)).double()
    assert epochs.mean(0).min() > 0.1 and epochs.mean(0).max() < 0.9  # by image, of 40
    assert torch.corrcoef(epochs).triu(1).abs().max() < 0.4


@pytest.mark.parametrize("other", [(1, "student", 0), (0, "teacher", 0), (0, "student", 1)])
def test_flips_depend_on_seed_role_and_data_stream(other: tuple) -> None:
    one, apart = (mirrored(drawn(numbered(), [4 * N], *a)[0]) for a in ((0, "student", 0), other))
    assert 0.4 < (one == apart).double().mean() < 0.6


@pytest.mark.parametrize("t", [0.1, 1.0, 20.0])
def test_the_posterior_is_over_the_images_and_their_mirror_images(t: float) -> None:
    """Against sums over all 40 in float64, the mirror images made by indexing."""
    dataset = tiny()
    images = (dataset.train.double() / 127.5 - 1).view(20, 3, 3, 3)
    images = torch.cat([images, images[:, :, :, [2, 1, 0]]])
    x = Draws(dataset, 0, "student", 0)(0, 60).x
    assert len(x.unique(dim=0)) > 30
    x_t = x + t * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    square = (x_t.double()[:, None] - images).square().sum((2, 3, 4))
    w = (-square / (2 * t**2)).softmax(1)
    mean = torch.einsum("bn,ncij->bcij", w, images)
    law = law_of(dataset)
    torch.testing.assert_close(law.weights(x_t, t).double(), w, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(law.denoiser(x_t, t).double(), mean, atol=2e-5, rtol=1e-4)
    at = Point(x, x_t, torch.full((60,), t), torch.tensor(5))
    assert torch.equal(estimate(Empirical(), Knowledge(law), at), law.denoiser(x_t, t))
    if t == 0.1:  # the point that x_t came from, mirrored or not, bit for bit
        assert torch.equal(law.denoiser(x_t, 1e-3), x)


def test_x_is_always_one_of_the_references() -> None:
    for dataset in (tiny(), tiny(flip=False)):
        law, generator = law_of(dataset), torch.Generator().manual_seed(0)
        known = {row.numpy().tobytes() for row in law.x}
        assert len(known) == dataset.size == (40 if dataset.flip else 20)
        x = Draws(dataset, 0, "student", 0)(0, 500).x
        for points in (x, dataset.draw(500, generator)):
            assert {row.numpy().tobytes() for row in points} == known
        x_t = x + torch.randn(x.shape, generator=generator)
        again = law.posterior_draws(x_t, 1.0, torch.tensor(3), 2).flatten(0, 1)
        assert {row.numpy().tobytes() for row in again} <= known
        # as a mean over so many references that all are among them, STF's estimate is the exact
        at = Point(x[:50], x_t[:50], torch.ones(50), torch.tensor(5))
        many = estimate(KSample(n=20_000), Knowledge(law), at)
        assert (many - law.denoiser(at.x_t, at.t)).abs().max() < 0.1


def test_the_probes_agree_that_x_is_a_posterior_draw() -> None:
    """Variance of a single sample is the posterior's, and the exact mean has no distance to the
    law's: neither holds if x and law are different sets."""
    dataset, sigma = tiny(), Sigma(min=0.5, max=4.0)
    law = law_of(dataset)
    found = probes.score_error(SingleSample(), Knowledge(law), dataset, sigma, 4, 4000)
    for name in ("variance", "distance2"):
        for value, error, known in zip(
            found[name], found[f"{name}_se"], found["posterior_variance"], strict=True
        ):
            apart = known if name == "variance" else 0.0
            assert abs(value - apart) < 5 * error + 1e-4
    exact = probes.score_error(Empirical(), Knowledge(law), dataset, sigma, 4, 200)
    assert max(map(abs, exact["distance2"])) < 1e-9
    star = probes.t_star(dataset, Sigma(min=0.01, max=10.0))
    assert 0.1 < star < 2  # 0 where points and weights are numbered differently


def test_what_samples_are_compared_with_is_not_mirrored() -> None:
    plain = data.load(Digits())
    flipped = replace(plain, flip=True).to(torch.device("cpu"))
    assert flipped.flip and flipped.digest == plain.digest and flipped.std == plain.std
    for part in ("train", "held_out"):
        x, y = (reference.images(dataset, 300, part) for dataset in (flipped, plain))
        assert torch.equal(x, y)
    assert law_of(flipped).x.shape == (1994, 1, 8, 8)
    assert torch.equal(law_of(flipped).x[:997], to_float(plain.train))


STUDY = """\
base:
  data: digits
  network: {kind: unet, width: 4}
  budget: {images: 256}
  batch: 64
  discretization: {kind: fixed, N: 10}
variants:
  ct:         {score: single_sample}
  exact:      {score: empirical}
  ct_flip:    {from: ct, augment: flip}
  exact_flip: {from: exact, augment: flip}
measure:
  at: [1.0]
  score_error: {sigmas: 3, samples: 32}
"""


def write(folder: Path, text: str = STUDY) -> Path:
    path = folder / "mirrored.yaml"
    path.write_text(text)
    return path


def test_ids_and_measures_tell_a_mirrored_run_from_a_plain_one(tmp_path: Path) -> None:
    runs = {r.recipe.name: r for r in load(write(tmp_path)).runs}
    written = load(write(tmp_path, STUDY.replace("batch: 64", "batch: 64\n  augment: none")))
    assert {r.id for r in written.runs} == {r.id for r in runs.values()}
    assert len({r.id for r in runs.values()}) == 4
    files = {name: {m.file for m in r.measures} for name, r in runs.items()}
    assert all(files.values())  # a score error each: the flip's is not the plain one's
    assert not files["ct"] & files["ct_flip"] and not files["exact"] & files["exact_flip"]


@pytest.mark.parametrize("kind", [
    "{kind: mixture, means: [[0.0], [1.0]], std: 0.1}",
    "{kind: mixture, means: [[0.0], [1.0]], std: 0.1, samples: 100}",
    "{kind: fitted_mixture, of: digits}",
    "{kind: fitted_mixture, of: digits, samples: 100}",
])  # fmt: skip
def test_mixtures_are_not_mirrored(kind: str, tmp_path: Path) -> None:
    text = STUDY.replace("data: digits", f"data: {kind}").replace("empirical", "single_sample")
    text = text.replace("{kind: unet, width: 4}", "mlp") if "means" in kind else text
    with pytest.raises(StudyError, match=r"variants.ct_flip.augment: flip is for real images; "
                       r"draws of a \w*mixture"):  # fmt: skip
        load(write(tmp_path, text))


def test_references_are_as_many_as_there_are_mirror_images(tmp_path: Path) -> None:
    for n, flip, known in ((997, "none", 997), (1994, "flip", 1994)):
        text = STUDY.replace("batch: 64", f"batch: 64\n  augment: {flip}")
        load(write(tmp_path, text.replace("empirical", f"{{kind: k_sample, n: {n}}}")))
        with pytest.raises(StudyError, match=f"there are {known}"):
            load(write(tmp_path, text.replace("empirical", f"{{kind: k_sample, n: {n + 1}}}")))


def test_a_study_with_mirrored_images_and_its_audit(tmp_path: Path) -> None:
    words = [str(write(tmp_path)), "--results", str(tmp_path), "--workers", "0"]
    assert run.main([*words, "--device", "cpu"]) == 0
    files = {
        path.parent.name.split("-")[0]: path
        for path in tmp_path.glob("mirrored/runs/*/trained.json")
    }
    trained = {name: json.loads(path.read_text()) for name, path in files.items()}
    digests = {name: facts["stream_digest"] for name, facts in trained.items()}
    assert digests["ct"] == digests["exact"] != digests["ct_flip"] == digests["exact_flip"]
    assert len({facts["data_digest"] for facts in trained.values()}) == 1

    def differing() -> list[str]:
        found = ledger.audit(load_results(tmp_path / "mirrored"))
        return [m.sentence for m in found if m.what == "stream_digest"]

    assert differing() == []
    other = json.dumps(trained["exact_flip"] | {"stream_digest": "zz"})
    files["exact_flip"].write_text(other)
    assert [s.rpartition(": ")[2] for s in differing()] == ["ct_flip against exact_flip."]
