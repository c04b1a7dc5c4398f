"""Samplers on Gaussians, whose maps are linear, and distances on sets whose distance is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch_fidelity
from distances import fid
from scipy import stats
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch_fidelity import registry
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from study import data, evaluate, reference
from study.data import Dataset
from study.errors import StudyError
from study.evaluate import (
    FID,
    KID,
    class_histogram,
    coverage,
    heun,
    kid,
    memorisation,
    mode_mass,
    multistep,
    sliced_wasserstein,
)
from study.factors import Sigma
from study.mixtures import GaussianMixture
from study.subjects import Digits, Mixture

SIGMA = Sigma(data=0.5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Gaussian:
    """The exact denoiser of N(m, s^2 I), which writes down the levels it is called at."""

    def __init__(self, m: Tensor, s: float) -> None:
        self.m, self.s, self.levels = m, s, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        self.levels.append(t[0].item())
        return self.m + (self.s**2 / (self.s**2 + t.double() ** 2))[:, None] * (x - self.m)


# --- samplers ---


@pytest.mark.parametrize(("nfe", "gain"), [(35, 1.055), (79, 1.010), (299, 1.0006)])
def test_heun_on_a_gaussian(nfe: int, gain: float) -> None:
    """Linear in z; gain relative to the flow's s / sqrt(s^2 + T^2) as in exact recursion with 18,
    40 and 150 levels."""
    m = torch.tensor([0.5, -2.0]).double()
    D, z = Gaussian(m, 0.5), normal(50, 2)
    x = heun(D, z, nfe, SIGMA)
    assert len(D.levels) == nfe
    flow = 0.5 / math.sqrt(0.25 + 80**2)
    centre = heun(D, torch.zeros(1, 2).double(), nfe, SIGMA)
    found = (x - centre) / (80 * z) / flow
    assert found.std() < 1e-6
    assert found.mean().item() == pytest.approx(gain, abs=6e-4)
    # what starts at T about 0 and not about m ends beside m by what the flow keeps of m
    assert (centre - m).abs().max() < 0.02 * m.abs().max()


def test_heun_reproduces_the_gaussian() -> None:
    m = torch.tensor([0.5]).double()
    x = heun(Gaussian(m, 0.5), normal(20_000, 1), 999, SIGMA)
    assert stats.kstest(x[:, 0].numpy(), stats.norm(0.5, 0.5).cdf).pvalue > 1e-3


def test_heun_visits_every_level_twice_but_the_first() -> None:
    D = Gaussian(torch.zeros(1).double(), 0.5)
    heun(D, normal(1, 1), 35, SIGMA)
    assert D.levels[0] == 80.0
    assert D.levels[-1] == pytest.approx(0.002)
    assert sorted(D.levels[1:], reverse=True) == D.levels[1:]
    assert len(set(D.levels)) == 18
    assert D.levels.count(D.levels[0]) == 1 and D.levels.count(D.levels[-1]) == 2


def flow(sigma: Sigma, m: float = 0.4, s: float = 0.5) -> evaluate.Function:
    """The consistency model of N(m, s^2 I): exact down to sigma_min."""

    def f(x: Tensor, t: Tensor) -> Tensor:
        gain = ((s**2 + sigma.min**2) / (s**2 + t.double() ** 2)).sqrt()
        return m + gain[:, None] * (x - m)

    return f


def test_one_and_two_steps_end_at_the_data_at_sigma_min() -> None:
    """x has Var s^2 + e^2 after one step; noise to `mid` makes it s^2 + mid^2, and f takes it
    back. A large e shows noise that is not sqrt(mid^2 - e^2)."""
    sigma, n = Sigma(min=0.5, max=800.0, data=0.5), 100_000
    z, z_mid = normal(n, 1), normal(n, 1, seed=1)
    for x in (
        multistep(flow(sigma), z, None, None, sigma),
        multistep(flow(sigma), z, z_mid, 0.8, sigma),
    ):
        assert x.var().item() == pytest.approx(0.5, rel=4 * math.sqrt(2 / n))
        assert abs(x.mean().item() - 0.4) < 4 * math.sqrt(0.5 / n)


def test_steps_start_from_sigma_max_and_mid() -> None:
    calls = []

    def f(x: Tensor, t: Tensor) -> Tensor:
        calls.append((x, t))
        return torch.full_like(x, 3.0)

    z, z_mid = normal(4, 1, 2, 2), normal(4, 1, 2, 2, seed=1)
    multistep(f, z, z_mid, 0.5, Sigma(min=0.3, max=7.0))
    assert torch.equal(calls[0][0], 7 * z) and calls[0][1].tolist() == [7.0] * 4
    torch.testing.assert_close(calls[1][0], 3 + 0.4 * z_mid)
    assert calls[1][1].tolist() == [0.5] * 4


def test_noise_is_addressed_by_seed_and_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(seed: int, draw: int, nfe: int = 1, n: int = 20) -> Tensor:
        record = {"samples": n, "nfe": nfe, "mid": 0.8 if nfe == 2 else None}
        return evaluate.samples(
            flow(SIGMA), record, (3,), SIGMA, seed, draw, torch.device("cpu")
        )

    for nfe in (1, 2, 35):
        one = drawn(0, 0, nfe)
        assert one.shape == (20, 3) and torch.equal(one, drawn(0, 0, nfe))
        for other in (drawn(1, 0, nfe), drawn(0, 1, nfe)):
            assert (one - other).abs().min() > 0
    assert len({round(drawn(0, 0, nfe)[0, 0].item(), 6) for nfe in (1, 2, 35)}) == 3
    whole = [drawn(0, 0, nfe) for nfe in (1, 2, 35)]
    monkeypatch.setattr(evaluate, "CHUNK", 7)
    torch.testing.assert_close([drawn(0, 0, nfe) for nfe in (1, 2, 35)], whole)


def test_the_second_steps_noise_is_new() -> None:
    seen = []

    def f(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    record = {"samples": 400, "nfe": 2, "mid": 0.8}
    evaluate.samples(f, record, (5,), SIGMA, 0, 0, torch.device("cpu"))
    z, z_mid = seen[0] / 80, seen[1] / math.hypot(0.8, 0.002)
    assert z.std().item() == pytest.approx(1, abs=4 / math.sqrt(4000))
    assert abs((z * z_mid).mean().item()) < 4 / math.sqrt(2000)


# --- vectors ---


def test_sliced_wasserstein_of_a_shift() -> None:
    """A shift by v moves the projections by <v, u>, and E <v, u>^2 = |v|^2 / d."""
    x, v = normal(200, 3), torch.tensor([1.0, -2.0, 2.0]).double()
    x, v = x.float(), v.float()
    shuffled = x[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert sliced_wasserstein(shuffled + v, x, 20_000) == pytest.approx(3 / 3**0.5, rel=0.02)
    assert sliced_wasserstein(shuffled, x, 100) < 1e-6
    assert sliced_wasserstein(x[:, :1] - 0.75, x[:, :1], 5) == pytest.approx(0.75, rel=1e-5)


def test_sliced_wasserstein_in_one_dimension_is_scipys_by_quantiles() -> None:
    a, b = normal(500, 1).float(), 2 * normal(500, 1, seed=1).float() ** 2
    q = (np.arange(500) + 0.5) / 500
    gaps = [np.quantile(x[:, 0].numpy(), q, method="inverted_cdf") for x in (a, b)]
    expected = np.sqrt(np.mean((gaps[0] - gaps[1]) ** 2))
    assert sliced_wasserstein(a, b, 3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("d", [1, 2, 16])
def test_mode_mass_of_the_mixture_itself(d: int) -> None:
    n, weights, stds = 40_000, [0.2, 0.5, 0.3], [0.1, 0.3, 0.2]
    means = [[-20.0] * d, [0.0] * d, [20.0] + [0.0] * (d - 1)]
    x = GaussianMixture.from_lists(means, stds, weights).sample(
        n, torch.Generator().manual_seed(d)
    )
    shares, between = mode_mass(x, torch.tensor(means), torch.tensor(stds))
    tail = stats.chi(d).sf(2 + math.sqrt(d))  # for d = 1 beyond three standard deviations
    assert abs(between - tail) < 4 * math.sqrt(tail * (1 - tail) / n)
    for share, w in zip(shares, weights, strict=True):
        p = w * (1 - tail)
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert shares.sum() + between == pytest.approx(1.0)


def test_mode_mass_counts_in_each_modes_own_std() -> None:
    means, stds = torch.tensor([[0.0], [10.0]]), torch.tensor([0.1, 4.0])
    shares, between = mode_mass(torch.tensor([[0.2], [1.0], [-9.0], [3.0]]), means, stds)
    assert shares.tolist() == [0.25, 0.5] and between == 0.25


# --- images ---


class Moments(FeatureExtractorBase):
    """Block means and one product of an image: small, deterministic features."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = images.double() / 255
        means = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return (torch.cat([means, (x.flatten(1) ** 2).mean(1, keepdim=True)], 1),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("moments",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "moments"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class Images(TorchDataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return self.x[i]


@pytest.fixture
def moments() -> Iterator[str]:
    registry.register_feature_extractor("moments", Moments)
    yield "moments"
    del registry.FEATURE_EXTRACTORS_REGISTRY["moments"]


def test_fid_and_kid_are_torch_fidelitys(moments: str) -> None:
    n, generator = 200, torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    b = torch.randint(0, 200, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    whole = torch_fidelity.calculate_metrics(
        input1=Images(a), input2=Images(b), feature_extractor=moments, cuda=False, fid=True,
        kid=True, kid_subsets=1, kid_subset_size=n, save_cpu_ram=True, cache=False, verbose=False,
    )  # fmt: skip
    features = [Moments(moments, ["moments"])(x)[0] for x in (a, b)]
    assert fid(*features) == pytest.approx(whole[FID], rel=1e-6)
    assert kid(*features) == pytest.approx(whole[KID], rel=1e-6)
    assert whole[FID] > 0.01 and whole[KID] > 0.01


def test_statistics_made_on_a_gpu_are_torch_fidelitys() -> None:
    x = (100 + normal(500, 6) @ normal(6, 6)).float()  # a mean far above the spread
    found, expected = evaluate.moments(x), evaluate.statistics(x, torch.device("cpu"))
    for name, tolerance in (("mu", 1e-6), ("sigma", 1e-12)):
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance)
    assert evaluate.frechet(found, expected) == pytest.approx(0, abs=1e-6)


def test_fid_of_a_shift_is_its_square() -> None:
    a, v = normal(300, 4), torch.tensor([1.0, 2.0, 0.0, -2.0]).double()
    assert fid(a, a + v) == pytest.approx(9.0, rel=1e-6)


def test_references_are_a_fixed_choice_of_different_images() -> None:
    dataset = data.load(Digits())
    for part, whole in (("train", dataset.train), ("held_out", dataset.held_out)):
        one, same = (reference.images(dataset, 100, part) for _ in range(2))
        assert torch.equal(one, same)
        assert len(one.unique(dim=0)) == 100
        apart = torch.cdist(one.flatten(1).float(), whole.flatten(1).float())
        assert (apart.min(1).values == 0).all()
        assert torch.equal(reference.images(dataset, 30, part), one[:30])
        every = reference.images(dataset, len(whole), part)
        assert torch.equal(every.unique(dim=0), whole.unique(dim=0))
    with pytest.raises(StudyError, match=r"401 samples.*400 held_out images.*reference: \[train"):
        reference.images(dataset, 401, "held_out")
    with pytest.raises(StudyError, match="998 samples.*997 train images"):
        reference.images(dataset, 998, "train")


def test_features_are_the_extractors_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = data.load(Digits()).held_out[:50]
    net = evaluate.extractor("digits-cnn", images.device)
    whole = evaluate.features(images, net)
    assert whole.shape == (50, 32) and whole.std(0).min() > 0
    monkeypatch.setattr(evaluate, "CHUNK", 8)
    torch.testing.assert_close(evaluate.features(images, net), whole)


def test_samples_of_an_exact_model_have_the_floors_distance() -> None:
    """The whole chain on a mixture: exact denoiser, Heun, sliced Wasserstein and mode mass."""
    dataset: Dataset = data.load(Mixture(means=((-1.0,), (1.0,)), std=0.1))
    record = {"samples": 4000, "nfe": 35, "mid": None}
    density, device = dataset.density, torch.device("cpu")
    x = evaluate.samples(density.denoiser, record, (1,), SIGMA, 0, 0, device)
    shares, between = mode_mass(x, density.means, density.stds)
    assert shares == pytest.approx([0.5, 0.5], abs=4 * 0.5 / 4000**0.5) and between < 0.01
    real = [dataset.fresh(4000, torch.Generator().manual_seed(i)) for i in range(8)]
    floor = [sliced_wasserstein(a, b, 4) for a, b in itertools.combinations(real, 2)]
    assert sliced_wasserstein(x, real[0], 4) < max(floor) + 0.02


# --- what samples repeat, and what they leave out ---


def wide(n: int, seed: int, d: int = 40) -> Tensor:
    return normal(n, d, seed=seed).float()


@pytest.mark.parametrize("d", [2, 40])
def test_nearest_is_the_nearest(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of near-duplicates far from the origin, where float32's product loses all digits."""
    b = 30 + wide(300, 0, d)
    b[150:] = b[:150] + 1e-3 * wide(150, 1, d)
    a = torch.cat([b[:40], b[:60] + 4e-4 * wide(60, 2, d)])
    apart = (a.double()[:, None] - b.double()).norm(dim=2)
    monkeypatch.setattr(evaluate, "CHUNK", 7)
    distance, index = evaluate.nearest(a, b)
    assert torch.equal(index, apart.argmin(1))
    torch.testing.assert_close(distance, apart.min(1).values)
    assert distance[:40].max() == 0


def test_nearest_reads_uint8_images_as_the_data_does() -> None:
    black, grey = torch.zeros(1, 1, 8, 8).byte(), torch.full((1, 1, 8, 8), 51).byte()
    distance, _ = evaluate.nearest(grey, black)
    assert distance.item() == pytest.approx(8 * 51 / 127.5, rel=1e-6)
    distance, _ = evaluate.nearest(torch.full((1, 1, 8, 8), -0.6), black)
    assert distance.item() == pytest.approx(8 * 0.4, rel=1e-6)


def test_training_images_are_memorised_and_held_out_images_the_opposite() -> None:
    train, held_out = wide(500, 0), wide(200, 1)
    result = memorisation(train, train, held_out)
    # of the others, that are not among the 200 chosen, half are nearer to training images
    assert result["compared"] == 200
    assert result["value"] == pytest.approx((1 + 200 / 500) / 2, abs=0.12)
    assert result["excess"] == 1.0
    assert result["nearest_train"] == result["ratio"] == 0.0
    assert result["nearest_held_out"] == float(evaluate.nearest(held_out, train)[0].median())
    whole = memorisation(train[:200] + 1e-3, train[:200], held_out)
    assert whole["value"] == whole["excess"] == 1.0 and whole["value_se"] == 0.0
    assert whole["nearest_train"] == pytest.approx(1e-3 * math.sqrt(40), rel=1e-3)
    assert whole["ratio"] < 0.01
    other = memorisation(held_out, train, held_out)
    assert other["value"] == 0.0 and other["ratio"] == 1.0


def test_new_draws_are_half_and_half_within_the_null_error() -> None:
    """Over many training sets; in 40 dimensions few images are nearest to many samples, so the
    binomial error is too small."""
    parts = [(300, 0), (700, 1000), (300, 2000)]
    results = [memorisation(*(wide(n, start + i) for n, start in parts)) for i in range(200)]
    found = {key: torch.tensor([r[key] for r in results]) for key in results[0]}
    for key, null, expected in (("value", "null_se", 0.5), ("excess", "excess_null_se", 0.0)):
        off, error = found[key] - expected, found[null]
        assert abs(float(off.mean())) < 4 * float(off.std()) / math.sqrt(200)
        assert (off.abs() < 4 * error).all()
        assert float(error.mean() / off.std()) == pytest.approx(1.0, abs=0.2)
    assert found["null_se"].mean() > 1.3 * found["value_se"].mean()
    assert float(found["value_se"].mean()) == pytest.approx(0.5 / math.sqrt(300), rel=0.05)
    assert float(found["ratio"].mean()) == pytest.approx(1.0, abs=0.01)


def test_with_many_images_new_draws_are_half_within_the_binomial_error() -> None:
    train, held_out, x = wide(20_000, 0, 2), wide(20_000, 1, 2), wide(400, 2, 2)
    result = memorisation(x, train, held_out)
    assert abs(result["value"] - 0.5) < 4 * result["value_se"]
    assert result["null_se"] == pytest.approx(result["value_se"], rel=0.1)


def test_memorisation_by_hand() -> None:
    """On a line: at .1 and .2 the training image 0 is nearer, at .9 the held-out 1, at .5 both."""
    train, held_out = torch.tensor([[0.0]]), torch.tensor([[1.0]])
    result = memorisation(torch.tensor([[0.125], [0.25], [0.875], [0.5]]), train, held_out)
    assert result["value"] == 2.5 / 4
    assert result["value_se"] == pytest.approx(math.sqrt(0.625 * 0.375 / 4))
    # either of the two images may be the training one: 3 / 4 or 1 / 4, the tie with the first
    assert result["null_se"] == pytest.approx(0.25)
    assert result["excess"] == 2 * result["value"] - 1
    assert result["excess_null_se"] == pytest.approx(0.5)
    assert result["nearest_train"] in (0.25, 0.5) and result["nearest_held_out"] == 1.0
    again = memorisation(train, train, train)
    assert again["value"] == 0.5 and math.isnan(again["ratio"])


def test_coverage_of_the_same_apart_and_half_the_modes() -> None:
    x = normal(100, 5)
    assert coverage(x, x, 3) == {"precision": 1.0, "recall": 1.0, "value": 1.0}
    assert coverage(x + 100, x, 3) == {"precision": 0.0, "recall": 0.0, "value": 0.0}
    modes = torch.cat([x, x + 100])
    half = coverage(x, modes, 3)
    assert (half["precision"], half["recall"], half["value"]) == (1.0, 0.5, 0.5)
    assert coverage(modes, x, 3)["precision"] == 0.5
    with pytest.raises(StudyError, match="100 asked for among 100"):
        coverage(x, modes, 100)


def test_coverage_of_new_draws_of_half_the_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = normal(600, 2)
    real[300:] += 50
    made = normal(400, 2, seed=1)
    result = coverage(made, real, 5)
    assert result["recall"] == pytest.approx(0.49, abs=0.02) and result["precision"] > 0.95
    monkeypatch.setattr(evaluate, "ROWS", 33)
    assert coverage(made, real, 5) == result


def test_coverage_by_hand() -> None:
    """On a line with one neighbour: real 0, 1, 5 have radii 1, 1, 4; samples 2, 2.5, 20 have .5,
    .5 and 17.5."""
    real, made = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[2.0], [2.5], [20.0]])
    result = coverage(made, real, 1)
    assert result["precision"] == pytest.approx(2 / 3)  # 20 lies in none
    assert result["recall"] == pytest.approx(1 / 3)  # 5 lies within 17.5 of 20


def test_class_histogram_by_hand() -> None:
    def logits(*classes: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(classes), 3).float() - 5

    result = class_histogram(logits(0, 0, 0, 1), logits(0, 0, 1, 1, 2, 2, 2, 2))
    assert result["shares"] == [0.75, 0.25, 0.0]
    assert result["reference_shares"] == [0.25, 0.25, 0.5]
    assert result["tv"] == 0.5
    entropies = [-sum(p * math.log(p) for p in ps) for ps in ([0.75, 0.25], [0.25, 0.25, 0.5])]
    assert result["entropy_ratio"] == pytest.approx(entropies[0] / entropies[1])
    assert math.isnan(class_histogram(logits(0, 1), logits(2, 2))["entropy_ratio"])
    same = class_histogram(logits(0, 1, 2), logits(2, 1, 0))
    assert same["tv"] == 0.0 and same["entropy_ratio"] == 1.0
