"""Isotropic Gaussian mixtures under Gaussian noise: a data set whose every posterior is known.

With x ~ sum_k w_k N(m_k, s_k^2 I) and x_t = x + t z, z ~ N(0, I), the noisy density is
p_t = sum_k w_k N(m_k, (s_k^2 + t^2) I), and given x_t

    g_k(x_t) proportional to w_k N(x_t; m_k, (s_k^2 + t^2) I),
    M_k = (t^2 m_k + s_k^2 x_t) / (s_k^2 + t^2),      c_k = s_k^2 t^2 / (s_k^2 + t^2),
    p(x | x_t) = sum_k g_k N(M_k, c_k I),             D(x_t, t) = sum_k g_k M_k,
    Cov[x | x_t] = sum_k g_k (c_k I + (M_k - D)(M_k - D)^T).

Score, denoiser, posterior draws and (in one dimension) the flow of the probability-flow ODE are
therefore available without any training error, at every noise level.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from study import noise
from study.consistency import solver_step
from study.errors import StudyError
from study.factors import Heun

RHO = 7.0  # warp of the solver's grid, Karras et al. 2022 (arXiv 2206.00364), eq. 5
STEPS = 256  # of the solver
BISECTIONS = 64  # brings any bracket below the spacing of float64

# Noise streams under a caller's key: which of the parts a draw comes from and its place there, and
# Gaussian noise between the parts, within each, and common to all.
CHOICE, PLACE, BETWEEN, WITHIN, COMMON = range(3000, 3005)

Level = float | Tensor  # a noise level: one number, or one per row, (B,)


class Law(Protocol):
    """What x is drawn from, as far as its posterior is known; x_t (B, ...), t a float or (B,), key
    an int64 scalar below 2^31 on x_t's device, of which random numbers are a pure function."""

    def denoiser(self, x_t: Tensor, t: Level) -> Tensor:
        """E[x | x_t] (B, ...)."""

    def posterior_variance(self, x_t: Tensor, t: Level) -> Tensor:
        """Tr Cov[x | x_t] (B,)."""

    def posterior_draws(self, x_t: Tensor, t: Level, key: Tensor, k: int) -> Tensor:
        """k independent exact draws of x given each x_t (k, B, ...)."""

    def posterior_noise(self, x_t: Tensor, t: Level, key: Tensor) -> Tensor:
        """Gaussian noise of mean 0 and covariance Cov[x | x_t] (B, ...)."""


class Density(Law, Protocol):
    """A population that is known at every noise level."""

    def to(self, device: torch.device | str) -> Self:
        """The same density on another device."""

    def std(self) -> float:
        """The standard deviation of all coordinates pooled."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws of the data (n, ...)."""

    def ode_map(self, x_t: Tensor, t: Level, r: Level) -> Tensor:
        """x_t carried from level t to r along the probability-flow ODE (B, ...)."""


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """sum_k w_k N(m_k, s_k^2 I) in d dimensions; results follow the dtype and device of x_t.

    Every method takes x_t of shape (B, d) and a noise level t >= 0, a float or a (B,) tensor.
    The tensors here and x_t must share device and dtype. Random draws come from the generator
    or key that is passed in, which must live on the same device.
    """

    means: Tensor  # (K, d)
    stds: Tensor  # (K,), above 0
    log_weights: Tensor  # (K,), logsumexp = 0

    @classmethod
    def from_lists(
        cls,
        means: Sequence[Sequence[float]],
        stds: Sequence[float],
        weights: Sequence[float],
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Build a mixture from K means, K standard deviations and K weights (normalised here).

        Raises StudyError if the lengths disagree, or a number is not finite, or a standard
        deviation or weight is not above 0.
        """
        widths = sorted({len(mean) for mean in means})
        if len(widths) != 1 or widths[0] == 0:
            raise StudyError(
                f"mixture: means must be one or more points of one dimension, got {len(means)} "
                f"points of dimensions {widths}"
            )
        for key, values in (("stds", stds), ("weights", weights)):
            if len(values) != len(means):
                raise StudyError(f"mixture: {len(values)} {key} for {len(means)} means")
            if not all(math.isfinite(value) and value > 0 for value in values):
                raise StudyError(f"mixture: {key} must be finite and above 0, got {list(values)}")
        if not all(math.isfinite(value) for mean in means for value in mean):
            raise StudyError("mixture: means must be finite")
        logs = torch.tensor(weights, dtype=torch.float64).log()
        return cls(
            means=torch.tensor([list(mean) for mean in means], dtype=dtype),
            stds=torch.tensor(list(stds), dtype=dtype),
            log_weights=logs.log_softmax(0).to(dtype),
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return the mixture on another device or in another floating-point type."""
        parts = (self.means, self.stds, self.log_weights)
        return type(self)(*(part.to(device=device, dtype=dtype) for part in parts))

    def std(self) -> float:
        """sigma_data: the standard deviation of all coordinates pooled about their common mean.

        This is what x.std() estimates from samples x of shape (n, d).
        """
        means, weights = self.means.double(), self.log_weights.double().exp()
        second = weights @ (self.stds.double() ** 2 + (means**2).mean(1))
        return math.sqrt(second - (weights @ means.mean(1)) ** 2)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points of the data, (n, d)."""
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        z = normal((n, self.means.shape[1]), self.means, generator)
        return self.means[k] + self.stds[k, None] * z

    def log_density(self, x_t: Tensor, t: Level) -> Tensor:
        """log p_t(x_t) in nats, (B,)."""
        return self._log_joint(x_t, column(t, x_t)).logsumexp(1)

    def score(self, x_t: Tensor, t: Level) -> Tensor:
        """grad log p_t(x_t) = sum_k g_k (m_k - x_t) / (s_k^2 + t^2), (B, d)."""
        t = column(t, x_t)
        pull = self._log_joint(x_t, t).softmax(1) / (self.stds**2 + t**2)  # (B, K)
        return torch.einsum("bk,bkd->bd", pull, self.means - x_t[:, None])

    def denoiser(self, x_t: Tensor, t: Level) -> Tensor:
        """D(x_t, t) = E[x | x_t], (B, d)."""
        g, centres, _ = self._posterior(x_t, t)
        return torch.einsum("bk,bkd->bd", g, centres)

    def posterior_variance(self, x_t: Tensor, t: Level) -> Tensor:
        """Tr Cov[x | x_t], (B,): the variance of the single-sample denoiser x about D."""
        g, centres, c = self._posterior(x_t, t)
        offsets = centres - torch.einsum("bk,bkd->bd", g, centres)[:, None]
        return (g * (x_t.shape[1] * c + (offsets**2).sum(2))).sum(1)

    def posterior_draws(self, x_t: Tensor, t: Level, key: Tensor, k: int) -> Tensor:
        """k independent exact draws of x given each row of x_t, (k, B, d)."""
        g, centres, c = self._posterior(x_t, t)
        row, j = torch.arange(len(g), device=g.device), chosen(g, key, k)  # (B,), (k, B)
        centre, spread = centres[row, j], c.expand_as(g)[row, j].sqrt()
        return centre + spread[:, :, None] * noise.normal(key, PLACE, centre.shape).to(x_t)

    def posterior_noise(self, x_t: Tensor, t: Level, key: Tensor) -> Tensor:
        """Gaussian noise of mean 0 and covariance Cov[x | x_t], (B, d): with xi, xi_k ~ N(0, 1),
        sqrt(sum_k g_k c_k) xi + sum_k sqrt(g_k) xi_k (M_k - D)."""
        g, centres, c = self._posterior(x_t, t)
        offsets = centres - torch.einsum("bk,bkd->bd", g, centres)[:, None]
        shares = g.sqrt() * noise.normal(key, BETWEEN, g.shape).to(g)
        common = (g * c).sum(1, keepdim=True).sqrt() * noise.normal(key, COMMON, x_t.shape).to(x_t)
        return common + torch.einsum("bk,bkd->bd", shares, offsets)

    def ode_map(self, x_t: Tensor, t: Level, r: Level) -> Tensor:
        """Carry x_t from level t to level r along dx/dt = -t score(x, t), (B, d).

        One component (K = 1): closed, x_r = m + sqrt((s^2 + r^2) / (s^2 + t^2)) (x_t - m).
        One dimension (d = 1): exact, the monotone quantile map F_r^{-1}(F_t(x_t)), by bisection.
        Otherwise: `heun` with the closed score. All of it in float64, returned in x_t's dtype.
        """
        x = x_t.double()
        t, r = column(t, x), column(r, x)
        mixture = self.to(dtype=torch.float64)
        growth = ((mixture.stds**2 + r**2) / (mixture.stds**2 + t**2)).sqrt()  # (B, K)
        alone = mixture.means + growth[:, :, None] * (x[:, None] - mixture.means)  # (B, K, d)
        if mixture.means.shape[0] == 1:
            x = alone[:, 0]
        elif mixture.means.shape[1] == 1:
            # Each component's own map keeps its own quantile, so the outermost two are a bracket.
            x = mixture._match_quantile(x, t, r, alone.amin(1), alone.amax(1))
        else:
            x = heun(mixture.score, x, t, r)
        return x.to(x_t.dtype)

    def _log_joint(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log w_k N(x_t; m_k, (s_k^2 + t^2) I), (B, K), from plain differences.

        Expanding the square instead would cancel at small t.
        """
        variance = self.stds**2 + t**2
        square = ((x_t[:, None] - self.means) ** 2).sum(2)
        norm = 0.5 * x_t.shape[1] * (2 * math.pi * variance).log()
        return self.log_weights - 0.5 * square / variance - norm

    def _posterior(self, x_t: Tensor, t: Level) -> tuple[Tensor, Tensor, Tensor]:
        """g_k (B, K), M_k (B, K, d) and c_k (B or 1, K)."""
        t = column(t, x_t)
        noise_share = t**2 / (self.stds**2 + t**2)
        data_share = self.stds**2 / (self.stds**2 + t**2)
        centres = noise_share[:, :, None] * self.means + data_share[:, :, None] * x_t[:, None]
        return self._log_joint(x_t, t).softmax(1), centres, self.stds**2 * noise_share

    def _match_quantile(
        self, x: Tensor, t: Tensor, r: Tensor, low: Tensor, high: Tensor
    ) -> Tensor:
        """Solve F_r(y) = F_t(x) for y in [low, high], all (B, 1).

        The mass of the components on x's left is taken off both sides, which leaves small terms
        only: no digits are lost in either tail, nor in a gap between modes.
        """
        left = self.means[:, 0] < x  # (B, K)
        sign, size = self._mass(x, t, left)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            sign_y, size_y = self._mass(middle, r, left)
            below = (sign_y < sign) | ((sign_y == sign) & (size_y < size))
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _mass(self, x: Tensor, t: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """F_t(x) minus the weight of the components marked left, as (sign, sign * log size)."""
        z = (x - self.means[:, 0]) / (self.stds**2 + t**2).sqrt()
        tails = self.log_weights + torch.special.log_ndtr(torch.where(left, -z, z))
        gained = tails.masked_fill(left, -math.inf).logsumexp(1, keepdim=True)
        missing = tails.masked_fill(~left, -math.inf).logsumexp(1, keepdim=True)
        size = torch.maximum(gained, missing) + (-torch.expm1(-(gained - missing).abs())).log()
        sign = (gained - missing).sign()
        return sign, torch.where(sign == 0, 0.0, sign * size)


def heun(
    score: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, r: Tensor, steps: int = STEPS
) -> Tensor:
    """Heun's method for dx/dt = -t score(x, t) from level t to r, both (B or 1, 1), on a rho = 7
    grid: error of order steps^-2.

    -t score stays finite at t = 0, unlike (x - D) / t.
    """

    def slope(x: Tensor, t: Tensor) -> Tensor:
        return -t * score(x, t)

    for i in range(steps):
        here, there = (
            (t ** (1 / RHO) + j / steps * (r ** (1 / RHO) - t ** (1 / RHO))) ** RHO
            for j in (i, i + 1)
        )
        x = solver_step(Heun(), slope, x, here, there)
    return x


def column(t: Level, like: Tensor) -> Tensor:
    """A noise level as (B, 1) or (1, 1), beside `like`."""
    return t.to(like).reshape(-1, 1) if isinstance(t, Tensor) else like.new_full((1, 1), t)


def chosen(weights: Tensor, key: Tensor, k: int) -> Tensor:
    """Indices (k, B): k independent draws of i, of probability weights (B, n), by races."""
    race = noise.exponential(key, CHOICE, (k, *weights.shape)).to(weights)
    return (weights / race).argmax(2)


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise with the dtype and device of `like`."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
