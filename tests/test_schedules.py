"""Noise levels against published tables, scipy's distributions and worked values."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from study.factors import (
    Doubling,
    Ema,
    Fixed,
    Law,
    LognormalGrid,
    Progressive,
    Sigma,
    UniformGrid,
)
from study.schedules import grid_points, karras, level, pair, target_decay

# the noise levels of EDM's 18-step sampler (Karras et al. 2022), the upper half, to three digits
EDM_18 = [80.0, 57.6, 40.8, 28.4, 19.4, 12.9, 8.40, 5.32, 3.26, 1.92, 1.09]
SIGMA = Sigma()
GRID = Fixed(N=2)  # that there is a grid; its N is given beside it


def grid(N: int, sigma: Sigma = SIGMA) -> torch.Tensor:
    return karras(torch.arange(N), N, sigma)


def uniform(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator, dtype=torch.float64)


def test_grid_is_edms() -> None:
    assert grid(18).flip(0)[:11].numpy() == pytest.approx(EDM_18, rel=4e-3)


@pytest.mark.parametrize("N", [2, 11, 1281])
@pytest.mark.parametrize("sigma", [SIGMA, Sigma(min=0.1, max=3.7, rho=3), Sigma(rho=1)])
def test_grid_ends_exactly_at_min_and_max(N: int, sigma: Sigma) -> None:
    levels = grid(N, sigma)
    assert levels.dtype == torch.float64
    assert levels[0].item() == sigma.min
    assert levels[-1].float() == torch.tensor(sigma.max)
    assert (levels.diff() > 0).all()


def test_rho_one_is_an_even_grid() -> None:
    expected = np.linspace(1.0, 3.0, 9)
    assert grid(9, Sigma(min=1, max=3, rho=1)).numpy() == pytest.approx(expected)


def test_doubling_is_icts_worked_example() -> None:
    """s0 = 10, s1 = 1280, K = 400 000: log2(128) + 1 = 8 stages of 50 000 steps."""
    K, ict = 400_000, Doubling(s0=10, s1=1280)
    for stage, N in enumerate([11, 21, 41, 81, 161, 321, 641, 1281]):
        first = stage * 50_000
        assert [grid_points(ict, k / K) for k in (first, first + 49_999)] == [N, N]


def test_doubling_never_passes_s1() -> None:
    """s1 / s0 = 100 gives 7.64 stages, of which the last would be 1 280."""
    uneven = Doubling(s0=10, s1=1000)
    assert [grid_points(uneven, p) for p in (0, 0.9, 0.99, 1)] == [11, 641, 1001, 1001]
    assert {grid_points(Doubling(s0=7, s1=7), p) for p in (0, 0.5, 1)} == {8}
    assert {grid_points(Fixed(N=18), p) for p in (0, 0.5, 1)} == {18}


@pytest.mark.parametrize(("share", "N"), [
    (0, 2), (1.25e-6, 3), (0.01, 16), (0.25, 76), (0.5, 107), (0.9, 144), (0.999, 151), (1, 151),
])  # fmt: skip
def test_progressive_of_cms_constants(share: float, N: int) -> None:
    """s0 = 2, s1 = 150: the root of 4 + 22 797 k/K, rounded up. k/K = .01: sqrt(231.97) = 15.23;
    .25: sqrt(5703.25) = 75.52; .5: sqrt(11 402.5) = 106.8; .9: sqrt(20 521.3) = 143.3."""
    assert grid_points(Progressive(), share) == N
    assert Progressive() == Progressive(s0=2, s1=150)


def test_progressive_passes_every_number_and_its_square_grows_evenly() -> None:
    share = np.linspace(0, 1, 10_001)
    N = np.array([grid_points(Progressive(s0=2, s1=150), p) for p in share])
    assert sorted(set(N)) == list(range(2, 152)) and (np.diff(N) >= 0).all()
    even = 4 + share * (151**2 - 4)  # (N - 1)^2 < even <= N^2
    assert ((N - 1) ** 2 < even).all() and (even <= N**2 + 1e-6).all()
    assert grid_points(Progressive(s0=10, s1=1280), 0.5) == 906  # sqrt(820 530.5) = 905.8
    assert {grid_points(Progressive(s0=10, s1=1280), p) for p in (0, 1)} == {10, 1281}


def test_decay_of_an_averaged_target() -> None:
    """mu(N) = exp(2 ln .9 / N): .9 at N = 2; ln .9 = -.10536052 gives exp(-.00139550) at 151."""
    cm = Ema(mu=0.9, s0=2)
    assert target_decay(cm, 2) == pytest.approx(0.9, rel=1e-12)
    assert target_decay(cm, 151) == pytest.approx(0.99860547, rel=1e-8)
    assert target_decay(Ema(mu=0.25, s0=9), 18) == pytest.approx(0.5)
    assert [target_decay(Ema(mu=0.9), N) for N in (2, 18, 151)] == [0.9, 0.9, 0.9]
    assert {target_decay(Ema(mu=0.0, s0=2), N) for N in (2, 151)} == {0.0}


def test_more_than_half_of_the_draws_lie_below_one_half() -> None:
    """Shares below c of exp(N(-1.1, 2)); with the sign of P_mean turned, .19 lie below 0.5."""
    t = level(LognormalGrid(), uniform(50_000), SIGMA)
    for c, share in [(0.5, 0.58), (1, 0.71), (1.5, 0.77), (2, 0.82), (3, 0.86), (10, 0.96)]:
        assert (t < c).double().mean().item() == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize(("mean", "std"), [(-1.1, 2.0), (1.3, 0.4), (-1.0, 30.0)])
def test_level_is_the_truncated_normals_quantile(mean: float, std: float) -> None:
    u = torch.cat([torch.tensor([0.0]).double(), uniform(500)])
    ends = [(np.log(s) - mean) / std for s in (SIGMA.min, SIGMA.max)]
    expected = np.exp(stats.truncnorm.ppf(u.numpy(), *ends, loc=mean, scale=std))
    t = level(LognormalGrid(P_mean=mean, P_std=std), u, SIGMA)
    assert t.numpy() == pytest.approx(expected, rel=1e-6)
    assert t.min() >= SIGMA.min and t.max() <= SIGMA.max


def test_uniform_grids_quantiles_are_edms_levels() -> None:
    """Quantiles i / 17 are the levels of the 18-step sampler."""
    t = level(UniformGrid(), torch.arange(17, 6, -1).double() / 17, SIGMA)
    assert t.dtype == torch.float64
    assert t.numpy() == pytest.approx(EDM_18, rel=4e-3)


@pytest.mark.parametrize(("sigma", "levels"), [
    (Sigma(min=1, max=3, rho=1), [1, 1.5, 2, 3]),
    (Sigma(min=1, max=9, rho=2), [1, 2.25, 4, 9]),  # roots 1, 1.5, 2, 3
    (Sigma(min=1, max=27, rho=3), [1, 3.375, 8, 27]),
    (Sigma(min=0.002, max=128, rho=7), [0.002, None, None, 128]),
])  # fmt: skip
def test_uniform_grids_worked_quantiles(sigma: Sigma, levels: list[float | None]) -> None:
    found = level(UniformGrid(), torch.tensor([0, 0.25, 0.5, 1]).double(), sigma).tolist()
    for value, expected in zip(found, levels, strict=True):
        assert expected is None or value == pytest.approx(expected, rel=1e-12)
    assert sigma.min <= min(found) and max(found) <= sigma.max


@pytest.mark.parametrize("N", [3, 11, 41])
@pytest.mark.parametrize("sigma", [SIGMA, Sigma(min=0.1, max=3.7, rho=3)])
def test_uniform_grids_pairs_are_equally_likely(N: int, sigma: Sigma) -> None:
    r, _ = pair(GRID, UniformGrid(), uniform(100_000, seed=N), N, sigma)
    drawn = np.bincount(np.searchsorted(grid(N, sigma).float().numpy(), r.numpy()), minlength=N)
    assert drawn[N - 1] == 0  # no interval begins at the top
    assert stats.chisquare(drawn[: N - 1]).pvalue > 1e-3


@pytest.mark.parametrize("N", [3, 11, 41])
def test_pairs_are_drawn_with_icts_frequencies(N: int) -> None:
    law = LognormalGrid()
    _, t = pair(GRID, law, uniform(100_000, seed=N), N, SIGMA)
    sigma = grid(N).numpy()
    p = np.diff(special.erf((np.log(sigma) - law.P_mean) / (np.sqrt(2) * law.P_std)))
    drawn = np.bincount(np.searchsorted(sigma.astype(np.float32), t.numpy()), minlength=N)[1:]
    assert stats.chisquare(drawn, p / p.sum() * len(t)).pvalue > 1e-3


@pytest.mark.parametrize("N", [2, 3, 18, 1281])
@pytest.mark.parametrize("law", [LognormalGrid(), UniformGrid()])
def test_pairs_are_neighbours_around_the_level(law: Law, N: int) -> None:
    u = torch.cat([torch.tensor([0.0, 1 - 2**-53, 1.0]).double(), uniform(5000)])
    r, t = pair(GRID, law, u, N, SIGMA)
    levels = grid(N).float()
    assert r.dtype == t.dtype == torch.float32
    below = torch.searchsorted(levels, r)
    assert torch.equal(levels[below], r) and torch.equal(levels[below + 1], t)
    inside = level(law, u, SIGMA).float()
    assert (r <= inside * (1 + 1e-6)).all() and (inside <= t * (1 + 1e-6)).all()
    high = LognormalGrid(P_mean=8.0, P_std=1.0)  # the last quantiles round to sigma_max itself
    assert level(high, u, SIGMA).max() == SIGMA.max
    assert pair(GRID, high, u, N, SIGMA)[1].max() == levels[-1]
    again = pair(GRID, law, u, torch.tensor(N), SIGMA)
    assert torch.equal(again[0], r) and torch.equal(again[1], t)
