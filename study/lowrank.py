"""Mixtures of low-rank Gaussians under Gaussian noise: image-sized data whose posterior is known.

With x ~ sum_k w_k N(m_k, S_k), S_k = U_k diag(l_k) U_k^T + s_k^2 I and U_k of q orthonormal
columns (a mixture of probabilistic principal component analysers, Tipping and Bishop 1999),
x_t = x + t z, y_k = x_t - m_k and p_k = U_k^T y_k,

    log N(y_k; 0, S_k + t^2 I) = -(|y_k|^2 - |p_k|^2) / (2 v_k) - sum_i p_ki^2 / (2 (l_ki + v_k))
        - ((d - q) log v_k + sum_i log(l_ki + v_k) + d log 2 pi) / 2,      v_k = s_k^2 + t^2,
    score of component k:   r_k = -(y_k - U_k (l_k p_k / (l_k + v_k))) / v_k,
    g_k(x_t) proportional to w_k N(y_k; 0, S_k + t^2 I),     D(x_t, t) = x_t + t^2 sum_k g_k r_k,
    p(x | x_t) = sum_k g_k N(x_t + t^2 r_k, C_k),            C_k = t^2 S_k (S_k + t^2 I)^-1.

No d x d matrix and no (B, K, d) tensor is ever made: two products with the K (q + 1) stacked means
and basis vectors do. All of it is in float64, for the logits' differences decide, not their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from study import noise
from study.mixtures import BETWEEN, COMMON, PLACE, WITHIN, Level, chosen, column, heun

CHUNK = 1 << 23  # float64 entries of one block: 64 MiB


@dataclass(frozen=True, eq=False)
class LowRankMixture:
    """sum_k w_k N(m_k, U_k diag(l_k) U_k^T + s_k^2 I) of points of any shape, d numbers each.

    Every method takes x_t of shape (B, *shape) and a noise level t >= 0, a float or a (B,) tensor,
    and answers in x_t's dtype. Tensors here and x_t share the device; random draws come from the
    generator or key that is passed in, which must live there too.
    """

    shape: tuple[int, ...]
    means: Tensor  # (K, d), float64 as all below
    bases: Tensor  # (K, q, d): U_k^T, orthonormal rows
    spreads: Tensor  # (K, q): l_k >= 0, variance along the rows beyond s_k^2
    stds: Tensor  # (K,): s_k > 0
    log_weights: Tensor  # (K,), logsumexp = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shape"}

    def to(self, device: torch.device | str) -> Self:
        """The mixture on another device."""
        return type(self)(self.shape, *(part.to(device) for part in self.tensors.values()))

    def std(self) -> float:
        """sigma_data: the standard deviation of all coordinates pooled about their common mean."""
        weights, d = self.log_weights.exp(), self.means.shape[1]
        second = self.means.square().mean(1) + self.stds**2 + self.spreads.sum(1) / d
        return math.sqrt(weights @ second - (weights @ self.means.mean(1)) ** 2)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n points of the data (n, *shape), float32."""
        device = self.means.device
        shares = self.log_weights.exp().cpu().cumsum(0).to(device)  # CUDA's sum has no fixed order
        u = torch.rand(n, generator=generator, dtype=shares.dtype, device=device)
        k = torch.searchsorted(shares, u).clamp(max=len(shares) - 1)
        z = torch.randn((n, self.means.shape[1]), generator=generator, device=device)
        wide = (self.spreads + self.stds[:, None] ** 2).sqrt()
        return torch.cat([
            (self.means[i] + _stretched(e, self.bases[i], self.stds[i, None], wide[i])).float()
            for i, e in self._blocks(k, z)
        ]).view(n, *self.shape)  # fmt: skip

    def component(self, x_t: Tensor, t: Level) -> Tensor:
        """The likeliest component of each point, (B,)."""
        return torch.cat([joint.argmax(1) for joint, *_ in self._joints(x_t, t)])

    def log_density(self, x_t: Tensor, t: Level) -> Tensor:
        """log p_t(x_t) in nats, (B,)."""
        joints = self._joints(x_t, t)
        return torch.cat([joint.logsumexp(1) for joint, *_ in joints]).to(x_t.dtype)

    def score(self, x_t: Tensor, t: Level) -> Tensor:
        """grad log p_t(x_t) = sum_k g_k r_k, (B, *shape)."""
        return torch.cat([s for s, *_ in self._scores(x_t, t)]).view(x_t.shape).to(x_t.dtype)

    def denoiser(self, x_t: Tensor, t: Level) -> Tensor:
        """D(x_t, t) = E[x | x_t] = x_t + t^2 score, (B, *shape)."""
        score = torch.cat([s for s, *_ in self._scores(x_t, t)])
        D = x_t.flatten(1) + column(t, score) ** 2 * score
        return D.view(x_t.shape).to(x_t.dtype)

    def posterior_variance(self, x_t: Tensor, t: Level) -> Tensor:
        """Tr Cov[x | x_t] = sum_k g_k (Tr C_k + t^4 |r_k|^2) - t^4 |score|^2, (B,)."""
        result = []
        for score, g, across, p, _, s in self._scores(x_t, t):
            v = self.stds**2 + s**2  # (B or 1, K)
            narrow, wide = self._shrunk(self.spreads, self.stds[:, None], s[:, :, None])
            trace = (score.shape[1] - p.shape[2]) * narrow[..., 0] + wide.sum(2)  # of C_k
            pull = across / v**2 + (p / (self.spreads + v[:, :, None])).square().sum(2)  # |r_k|^2
            between = ((g * pull).sum(1) - score.square().sum(1)).clamp(min=0)
            result.append((g * trace).sum(1) + s[:, 0] ** 4 * between)
        return torch.cat(result).to(x_t.dtype)

    def posterior_draws(self, x_t: Tensor, t: Level, key: Tensor, k: int) -> Tensor:
        """k independent exact draws of x given each row of x_t, (k, B, *shape)."""
        g = torch.cat([joint.softmax(1) for joint, *_ in self._joints(x_t, t)])
        levels = column(t, g).expand(len(g), 1).repeat(k, 1)
        points = x_t.flatten(1).repeat(k, 1)
        z = noise.normal(key, PLACE, points.shape)
        result = []
        for i, e, x, s in self._blocks(chosen(g, key, k).flatten(), z, points, levels):
            U, spread, std = self.bases[i], self.spreads[i], self.stds[i, None]
            v = std**2 + s**2  # (b, 1)
            y = x - self.means[i]
            r = -(y - _up(U, spread / (spread + v) * _down(U, y))) / v
            narrow, wide = self._shrunk(spread, std, s)
            result.append(x + s**2 * r + _stretched(e, U, narrow.sqrt(), wide.sqrt()))
        return torch.cat(result).view(k, *x_t.shape).to(x_t.dtype)

    def posterior_noise(self, x_t: Tensor, t: Level, key: Tensor) -> Tensor:
        """Gaussian noise of mean 0 and covariance Cov[x | x_t], (B, *shape).

        Cov = sum_k g_k (C_k + t^4 (r_k - score)(r_k - score)^T), and C_k is narrow_k I and
        wide_ki - narrow_k more along the basis; with xi ~ N(0, 1) for every part of it,
        sqrt(sum_k g_k narrow_k) xi + sum_k sqrt(g_k) U_k (sqrt(wide_ki - narrow_k) xi_ki)
            + t^2 sum_k sqrt(g_k) xi_k (r_k - score).
        """
        result, done = [], 0
        for score, g, _, p, x, s in self._scores(x_t, t):
            parts = (COMMON, x), (BETWEEN, g), (WITHIN, p)
            common, between, within = (
                noise.normal(key, stream, part.shape, start=done * part[0].numel()).double()
                for stream, part in parts
            )
            narrow, wide = self._shrunk(self.spreads, self.stds[:, None], s[:, :, None])
            shares = g.sqrt() * between
            field = self._pulled(shares, p, x, s) - shares.sum(1, keepdim=True) * score
            within = (g[:, :, None] * (wide - narrow).clamp(min=0)).sqrt() * within
            common = (g * narrow[..., 0]).sum(1, keepdim=True).sqrt() * common
            along = within.flatten(1) @ self.bases.flatten(0, 1)
            result.append(common + along + s**2 * field)
            done += len(x)
        return torch.cat(result).view(x_t.shape).to(x_t.dtype)

    def ode_map(self, x_t: Tensor, t: Level, r: Level) -> Tensor:
        """Carry x_t from level t to level r along dx/dt = -t score(x, t), (B, *shape): `heun` with
        the exact score, in float64."""
        x = x_t.double().flatten(1)
        x = heun(self.score, x, column(t, x), column(r, x))
        return x.view(x_t.shape).to(x_t.dtype)

    def _joints(self, x_t: Tensor, t: Level) -> Iterator[tuple[Tensor, ...]]:
        """In blocks of rows: log w_k N(x_t; m_k, S_k + t^2 I) (b, K), |y_k|^2 - |p_k|^2 (b, K),
        p_k (b, K, q), and the rows themselves (b, d) and their levels (b or 1, 1), float64."""
        (K, q, d), U = self.bases.shape, self.bases.flatten(0, 1)
        t = column(t, self.means)
        offset, norm = torch.einsum("kqd,kd->kq", self.bases, self.means), self.means.square()
        for x, s in _split(CHUNK // (2 * K * (q + 1) + d), x_t.flatten(1), t):
            x = x.double()
            p = (x @ U.T).view(-1, K, q) - offset
            whole = x.square().sum(1, keepdim=True) - 2 * x @ self.means.T + norm.sum(1)
            across = (whole - p.square().sum(2)).clamp(min=0)
            v = self.stds**2 + s**2  # (b or 1, K)
            along = self.spreads + v[:, :, None]  # (b or 1, K, q)
            square = across / v + (p.square() / along).sum(2)
            volume = (d - q) * v.log() + along.log().sum(2) + d * math.log(2 * math.pi)
            yield self.log_weights - (square + volume) / 2, across, p, x, s

    def _scores(self, x_t: Tensor, t: Level) -> Iterator[tuple[Tensor, ...]]:
        """In blocks of rows: score (b, d), g_k (b, K), |y_k|^2 - |p_k|^2, p_k, rows and levels."""
        for joint, across, p, x, s in self._joints(x_t, t):
            g = joint.softmax(1)
            yield self._pulled(g, p, x, s), g, across, p, x, s

    def _pulled(self, shares: Tensor, p: Tensor, x: Tensor, s: Tensor) -> Tensor:
        """sum_k a_k r_k (b, d) for coefficients a (b, K)."""
        v = self.stds**2 + s**2
        pull = shares / v
        back = pull[:, :, None] * (self.spreads / (self.spreads + v[:, :, None]) * p)
        pulled = pull @ self.means - pull.sum(1, keepdim=True) * x
        return pulled + back.flatten(1) @ self.bases.flatten(0, 1)

    @staticmethod
    def _shrunk(spreads: Tensor, std: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues of C = t^2 S (S + t^2 I)^-1: across the basis, and along it."""
        variance = std**2
        wide = spreads + variance
        return t**2 * variance / (variance + t**2), t**2 * wide / (wide + t**2)

    def _blocks(self, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Rows of the parts together, few enough to hold a basis for each."""
        return _split(CHUNK // self.bases[0].numel(), *parts)


def _split(rows: int, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The parts cut together into blocks of rows; a part of one row goes with every block."""
    n = max(len(part) for part in parts)
    for start in range(0, n, max(1, rows)):
        yield tuple(p if len(p) == 1 else p[start : start + max(1, rows)] for p in parts)


def _down(U: Tensor, x: Tensor) -> Tensor:
    """U^T x (b, q) of bases (b, q, d) and points (b, d)."""
    return torch.einsum("bqd,bd->bq", U, x)


def _up(U: Tensor, p: Tensor) -> Tensor:
    """U p (b, d) of bases (b, q, d) and coordinates (b, q)."""
    return torch.einsum("bqd,bq->bd", U, p)


def _stretched(z: Tensor, U: Tensor, narrow: Tensor, wide: Tensor) -> Tensor:
    """Noise z (b, d) scaled by `wide` (b, q) along the bases and by `narrow` (b, 1) across."""
    z = z.double()
    return narrow * z + _up(U, (wide - narrow) * _down(U, z))
