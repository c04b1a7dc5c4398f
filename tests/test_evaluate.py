"""Samplers on Gaussians, whose maps are linear, and distances on sets whose distance is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch_fidelity
from scipy import stats
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch_fidelity import registry
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from study import data, evaluate
from study.data import Dataset
from study.evaluate import FID, KID, fid, heun, kid, mode_mass, multistep, sliced_wasserstein
from study.factors import Digits, Mixture, Sigma
from study.mixtures import GaussianMixture

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


def test_fid_of_a_shift_is_its_square() -> None:
    a, v = normal(300, 4), torch.tensor([1.0, 2.0, 0.0, -2.0]).double()
    assert fid(a, a + v) == pytest.approx(9.0, rel=1e-6)


def test_references_are_a_fixed_choice_of_different_images() -> None:
    dataset = data.load(Digits())
    one, same = (evaluate.references(dataset, 100) for _ in range(2))
    assert set(one) == {"train", "held_out"}
    for part, whole in (("train", dataset.train), ("held_out", dataset.held_out)):
        assert torch.equal(one[part], same[part])
        assert len(one[part].unique(dim=0)) == 100
        apart = torch.cdist(one[part].flatten(1).float(), whole.flatten(1).float())
        assert (apart.min(1).values == 0).all()
        assert torch.equal(evaluate.references(dataset, 30)[part], one[part][:30])


def test_features_are_the_extractors_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = data.load(Digits()).held_out[:50]
    whole = evaluate.features(images, "digits-cnn")
    assert whole.shape == (50, 32) and whole.std(0).min() > 0
    monkeypatch.setattr(evaluate, "CHUNK", 8)
    torch.testing.assert_close(evaluate.features(images, "digits-cnn"), whole)


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
