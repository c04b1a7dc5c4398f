"""The score estimates: what stands for E[x | x_t] in the solver step.

`estimate` returns D^(x_t, t), from which the probability-flow ODE's slope is (x_t - D^) / t and
the score (D^ - x_t) / t^2. Each case states its mean and covariance given x_t. CT and CD differ in
this function and nowhere else (Song et al. 2023, Algorithms 2 and 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from study.factors import Analytic, Empirical, Score, SingleSample, Teacher
from study.mixtures import Density

CHUNK = 1 << 26  # entries of one block of logits
FEW = 32  # dimensions

Denoiser = Callable[[Tensor, Tensor], Tensor]


class Posterior:
    """The exact posterior over a finite training set: w_i = softmax_i(-|x_t - x_i|^2 / (2 t^2)).

    Logits are computed as (<x_t, x_i> - |x_i|^2 / 2) / t^2 about the data's mean, in float32
    without TF32: their differences, not their size, decide, and at small t reduced precision is
    garbage. In few dimensions points can lie closer than the rounding of that product, so there
    the logits come from plain differences.
    """

    def __init__(self, x: Tensor) -> None:
        """x: training set (n, ...), float32."""
        self.x, self.shape, flat = x, x.shape[1:], x.flatten(1)
        self.mean_image = flat.mean(0)
        self.centred = flat - self.mean_image  # (n, d)
        self.half_norm = self.centred.square().sum(1) / 2  # (n,)

    def weights(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Posterior weights (B, n) at x_t (B, ...), t (B,)."""
        query = x_t.flatten(1) - self.mean_image
        with torch.autocast(x_t.device.type, enabled=False):
            if self.centred.shape[1] <= FEW:
                log_joint = -self._distance(query).square() / 2
            else:
                log_joint = query @ self.centred.T - self.half_norm
            logits = log_joint / t[:, None].square()
        return logits.softmax(1)

    def _distance(self, query: Tensor) -> Tensor:
        """|q - x_i| (B, n) of centred queries, from plain differences: slow but exact."""
        return torch.cdist(query, self.centred, compute_mode="donot_use_mm_for_euclid_dist")

    def _chunks(self, x_t: Tensor, t: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = max(1, CHUNK // len(self.centred))
        return list(zip(x_t.split(rows), t.split(rows), strict=True))

    def mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """D_emp(x_t, t) (B, ...): the empirical denoiser."""
        means = [self.weights(x, s) @ self.centred for x, s in self._chunks(x_t, t)]
        return (torch.cat(means) + self.mean_image).view(-1, *self.shape)

    def variance(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Trace of Cov[x | x_t] (B,).

        Taken about the likeliest image, Tr Cov = E|x - x_top|^2 - |E[x] - x_top|^2, so that it is
        0, and no cancelled difference, where the posterior is a point.
        """
        result = []
        for x, s in self._chunks(x_t, t):
            w = self.weights(x, s)
            top = w.argmax(1, keepdim=True)
            image, norm = self.centred[top[:, 0]], self.half_norm[top]
            if self.centred.shape[1] <= FEW:
                apart = self._distance(image).square()  # (B, n)
            else:
                apart = 2 * (norm + self.half_norm - image @ self.centred.T).clamp(min=0)
            apart.scatter_(1, top, 0.0)
            offset = w @ self.centred - image
            result.append((w * apart).sum(1) - offset.square().sum(1))
        return torch.cat(result)

    def sample(self, x_t: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """One exact draw x ~ p(x | x_t) per row (B, ...)."""
        index = [
            torch.multinomial(self.weights(x, s), 1, generator=generator)[:, 0]
            for x, s in self._chunks(x_t, t)
        ]
        return self.x[torch.cat(index)]


@dataclass(frozen=True)
class Knowledge:
    """What a score may consult. Each is None where the study has no such thing."""

    teacher: Denoiser | None = None
    posterior: Posterior | None = None
    density: Density | None = None


def estimate(score: Score, known: Knowledge, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """D^ (B, ...) for clean x (B, ...), x_t = x + t z, and levels t (B,)."""
    match score:
        case SingleSample():
            # mean E[x | x_t] under the data x was drawn from; covariance Cov[x | x_t]
            return x
        case Teacher():
            # mean D_phi(x_t, t); covariance 0
            return known.teacher(x_t, t)
        case Empirical():
            # mean E[x | x_t] over the training set, exactly; covariance 0
            return known.posterior.mean(x_t, t)
        case Analytic():
            # mean E[x | x_t] under the population, exactly; covariance 0
            return known.density.denoiser(x_t, t)
        case _:
            assert_never(score)
