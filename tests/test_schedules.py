"""Noise levels against published tables, scipy's distributions and worked values."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from study import networks
from study.data import Batch
from study.factors import (
    L1,
    Budget,
    Distance,
    Doubling,
    EctMapping,
    Ema,
    Factors,
    Fixed,
    L2Norm,
    Law,
    LognormalGrid,
    LogUniform,
    Progressive,
    PseudoHuber,
    Sigma,
    UniformGrid,
)
from study.losses import Problem
from study.schedules import grid_points, karras, level, pair, target_decay
from study.subjects import Mixture, Mlp

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


def test_doublings_stages_of_an_uneven_length() -> None:
    """s0 = 10, s1 = 640: log2(64) + 1 = 7 stages. K = 1000: the paper's K' = floor(1000 / 7) = 142
    updates a stage; here stages are equal shares, 142.86, so that stage j begins at update
    143, 286, 429, 572, 715, 858 and not at 142 j: at most six updates later."""
    found = [grid_points(Doubling(s0=10, s1=640), k / 1000) for k in range(1000)]
    begins = [k for k in range(1, 1000) if found[k] != found[k - 1]]
    assert begins == [143, 286, 429, 572, 715, 858]
    assert [found[k] for k in (0, *begins)] == [11, 21, 41, 81, 161, 321, 641]


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


def quantiles(n: int = 100_000) -> torch.Tensor:
    """Midpoints of n equal shares: a share of draws is then exact to 1 / n."""
    return (torch.arange(n).double() + 0.5) / n


@pytest.mark.parametrize(("law", "shares"), [
    (LognormalGrid(P_mean=-1.1, P_std=2.0), {0.5: 0.58, 1: 0.71, 1.5: 0.77, 2: 0.82, 5: 0.91}),
    (LognormalGrid(P_mean=-1.0, P_std=1.4), {0.5: 0.59, 1: 0.76, 1.5: 0.84, 2: 0.89, 5: 0.97}),
    (LognormalGrid(P_mean=-1.2, P_std=1.2), {0.5: 0.66, 1: 0.84, 1.5: 0.91, 2: 0.94, 5: 0.99}),
    (UniformGrid(), {0.5: 0.34, 1: 0.40, 1.5: 0.44, 2: 0.475, 5: 0.58}),
])  # fmt: skip
def test_shares_of_draws_below_a_level(law: Law, shares: dict[float, float]) -> None:
    """iCT's and ECT's law, sCM's, EDM's, CM's. For iCT's below 1: ln 1 is .55 deviations above
    the mean, Phi(.55) = .7088; from .002 to 80, Phi(-2.557) = .0053 and Phi(2.741) = .9969, so
    (.7088 - .0053) / (.9969 - .0053) = .7095. CM's: 7th roots .41156 (.002), 1 and 1.87012 (80),
    so .58844 / 1.45856 = .4034."""
    t = level(law, quantiles(), SIGMA)
    for c, share in shares.items():
        assert (t < c).double().mean().item() == pytest.approx(share, abs=0.01)


def test_sign_of_icts_mean() -> None:
    """ln sigma ~ N(-1.1, 2^2) has .71 of its draws below 1; N(+1.1, 2^2) would have
    Phi(-.55) = .291, and between the ends .307."""
    below = (level(LognormalGrid(), quantiles(), SIGMA) < 1).double().mean().item()
    shares = {}
    for mean in (-1.1, 1.1):
        ends = [(np.log(s) - mean) / 2 for s in (SIGMA.min, SIGMA.max)]
        shares[mean] = stats.truncnorm.cdf(0, *ends, loc=mean, scale=2)
    assert shares[-1.1] == pytest.approx(0.7095, abs=1e-4)
    assert shares[1.1] == pytest.approx(0.307, abs=1e-3)
    assert below == pytest.approx(shares[-1.1], abs=1e-4)
    assert LognormalGrid() == LognormalGrid(P_mean=-1.1, P_std=2.0)


def test_log_uniforms_worked_quantiles() -> None:
    """80 / .002 = 40 000, whose square root is 200 and whose fourth root is 14.142136."""
    u = torch.tensor([0, 0.25, 0.5, 0.75, 1]).double()
    expected = [0.002, 0.02828427, 0.4, 5.656854, 80.0]
    assert level(LogUniform(), u, SIGMA).tolist() == pytest.approx(expected, rel=1e-6)
    t = level(LogUniform(), quantiles(), SIGMA).log().numpy()
    ends = np.log([SIGMA.min, SIGMA.max])
    assert stats.kstest(t, "uniform", (ends[0], ends[1] - ends[0])).statistic < 1e-4
    assert SIGMA.min <= np.exp(t.min()) * (1 + 1e-12) and level(LogUniform(), u, SIGMA).max() <= 80


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


def test_icts_discretised_law_in_numbers() -> None:
    """N = 4, rho = 1 on [1, 4]: levels 1, 2, 3, 4; ln 2 = .6931, ln 3 = 1.0986, ln 4 = 1.3863.
    With P = (0, 1): erf(.4901) = .5118, erf(.7768) = .7281, erf(.9803) = .8343; the shares of the
    intervals are .5118, .2163, .1062 of .8343: .6134, .2593, .1273."""
    sigma, law = Sigma(min=1, max=4, rho=1), LognormalGrid(P_mean=0.0, P_std=1.0)
    r, t = pair(GRID, law, quantiles(), 4, sigma)
    assert torch.equal(t - r, torch.ones_like(t))
    found = [(r == low).double().mean().item() for low in (1, 2, 3)]
    assert found == pytest.approx([0.6134, 0.2593, 0.1273], abs=2e-4)
    exact = np.diff(special.erf(np.log([1, 2, 3, 4]) / np.sqrt(2)))
    assert found == pytest.approx(exact / exact.sum(), abs=2e-5)


@pytest.mark.parametrize("N", [2, 3, 18, 1281])
@pytest.mark.parametrize("law", [LognormalGrid(), UniformGrid(), LogUniform()])
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


# --- ECT's mapping ---

ECT = EctMapping(q=2, k=8, b=1, stages=8)


def at(*levels: float) -> torch.Tensor:
    """The quantiles u at which the log-uniform law has these levels."""
    return (torch.tensor(levels).double() / SIGMA.min).log() / np.log(SIGMA.max / SIGMA.min)


def test_ects_stages_are_equal_shares() -> None:
    """q^(s + 1): 2 in the first eighth, 4, ..., 256 in the last; 200 000 updates: 25 000 each."""
    K = 200_000
    for stage, N in enumerate([2, 4, 8, 16, 32, 64, 128, 256]):
        first = stage * 25_000
        assert [grid_points(ECT, k / K) for k in (first, first + 24_999)] == [N, N]
    assert grid_points(ECT, 1.0) == 256
    hour = EctMapping(q=256, stages=1)  # the authors' script of one hour
    assert {grid_points(hour, p) for p in (0, 0.5, 1)} == {256}
    assert EctMapping() == ECT


@pytest.mark.parametrize(("t", "stage", "r"), [
    (1.0, 1, 0.212117),  # n = 1 + 8 * .268941 = 3.151531; 1 - n / 4
    (1.0, 2, 0.606059),  # 1 - n / 8
    (1.0, 7, 0.987689),  # 1 - n / 256
    (0.1, 2, 0.0399979),  # n = 1 + 8 * .475021 = 4.800166; .1 (1 - n / 8)
    (0.1, 7, 0.0981249),
    (10.0, 0, 4.998184),  # n = 1 + 8 * 4.53979e-5 = 1.000363; 10 (1 - n / 2)
    (10.0, 7, 9.960923),
    (80.0, 0, 40.0),  # n = 1
    (1.0, 0, 0.002),  # 1 - n / 2 < 0: sigma_min, in the place of ECT's 0
    (0.1, 1, 0.002),
    (0.004, 2, 0.002),  # n = 1 + 8 * .499 = 4.992, 1 - n / 8 = .376: .0015 is below sigma_min
    (0.004, 7, 0.003922),  # .004 (1 - .0195)
])  # fmt: skip
def test_ects_mapping_in_numbers(t: float, stage: int, r: float) -> None:
    for N in (2.0 ** (stage + 1), torch.tensor(2.0 ** (stage + 1)).double()):
        found = pair(ECT, LogUniform(), at(t), N, SIGMA)
        assert [v.item() for v in found] == pytest.approx([r, t], rel=2e-6)
        assert found[0].dtype == found[1].dtype == torch.float32


@pytest.mark.parametrize("k", [0.0, 8.0])
def test_ects_step_without_sigmoid_and_at_zero_slope(k: float) -> None:
    """k = 0: r = t (1 - 1 / q^(s + 1)) at every t; b = 0: n = 1 + k / 2."""
    r, t = pair(EctMapping(k=k, b=0.0), LogUniform(), at(0.5, 5.0), 16.0, SIGMA)
    assert (r / t).tolist() == pytest.approx([1 - (1 + k / 2) / 16] * 2, rel=1e-6)


@pytest.mark.parametrize("law", [LognormalGrid(), UniformGrid(), LogUniform()], ids=str)
@pytest.mark.parametrize("q", [1.001, 2.0, 256.0, 10_000.0])
def test_ects_pairs_stay_in_order_and_above_sigma_min(law: Law, q: float) -> None:
    u = torch.cat([torch.tensor([0.0, 1e-9, 2**-53, 1 - 2**-53, 1.0]).double(), uniform(3000)])
    for N in (q, q**8):
        r, t = pair(EctMapping(q=q), law, u, N, SIGMA)
        assert (r < t).all() and r.isfinite().all()
        assert r.min() >= torch.tensor(SIGMA.min) and t.max() <= torch.tensor(SIGMA.max)
        assert ((t - r) / t).min() > 0.9e-4  # a step that float32 can tell


@pytest.mark.parametrize("distance", [L2Norm(), PseudoHuber(), L1()], ids=str)
@pytest.mark.parametrize("N", [2, 256])
def test_ects_loss_and_gradient_are_finite_at_the_ends(distance: Distance, N: int) -> None:
    """Also at the first update, where f(x_t, t) of x_t = 0 is its target to the last bit."""
    factors = Factors(
        data=Mixture(means=((0.0,),), std=0.5),
        network=Mlp(width=8, depth=1),
        budget=Budget(images=1),
        discretization=ECT,
        distance=distance,
    )
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 6, 2, generator=generator)
    x[3], z[3] = 0, 0
    u = torch.tensor([0.0, 1e-12, 1e-6, 0.5, 1 - 2**-53, 1.0]).double()
    net = networks.build(factors.network, (2,), 0.0, 0, "")
    for update in range(2):
        rows = Problem(factors, Sigma(data=0.5), net).losses(
            Batch(x, z, u, torch.tensor(7), torch.tensor(8)), N
        )
        assert rows.isfinite().all() and rows[4:].min() > 0
        assert update or rows[3] == 0
        net.zero_grad()
        rows.sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        assert net.out.weight.grad.abs().max() > 0
        torch.nn.init.normal_(net.out.weight, generator=generator)
