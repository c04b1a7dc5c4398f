"""The score estimates: what stands for E[x | x_t] in the solver step.

`estimate` returns D^(x_t, t), from which the probability-flow ODE's slope is (x_t - D^) / t and
the score (D^ - x_t) / t^2. Each case states its mean and covariance given x_t, where x is a draw
from the posterior of the law that training draws from: the training set, or endless data. CT and
CD differ in this function and nowhere else (Song et al. 2023, Algorithms 2 and 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import assert_never

import torch
from torch import Tensor

from study import noise
from study.factors import (
    Analytic,
    Blend,
    Empirical,
    KSample,
    Own,
    PosteriorK,
    Score,
    SingleSample,
    Teacher,
    Windowed,
)
from study.mixtures import Density
from study.posterior import Posterior

CHUNK = 1 << 26  # numbers of one block of references
REFERENCES = 2001  # the noise stream that chooses them
DRAWN = 2003  # the noise stream of further draws' keys
TOGETHER = 32  # posterior draws made at once

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Knowledge:
    """What a score may consult. law: what x is drawn from, as far as its posterior is known: the
    finite training set, or the population; density: the population, where known; teachers: by the
    name of their source; own: the student's own denoising head, averaged."""

    law: Posterior | Density | None = None
    density: Density | None = None
    teachers: Mapping[str, Denoiser] = field(default_factory=dict)
    own: Denoiser | None = None


@dataclass(frozen=True)
class Point:
    """Where an estimate is asked for. x: (B, ...) clean, x_t = x + t z, t (B,); draw: the key of
    the estimate's own randomness; progress: of training, in [0, 1]; start: where the solver's step
    started, by which a window chooses (t itself, if None)."""

    x: Tensor
    x_t: Tensor
    t: Tensor
    draw: Tensor
    progress: Tensor | float = 1.0
    start: Tensor | None = None


def estimate(score: Score, known: Knowledge, at: Point) -> Tensor:
    """D^ (B, ...)."""
    x, x_t, t = at.x, at.x_t, at.t
    match score:
        case SingleSample():
            # mean E[x | x_t]; covariance Cov[x | x_t]
            return x
        case Teacher(run=run):
            # mean D_phi(x_t, t); covariance 0
            return known.teachers[run](x_t, t)
        case Empirical():
            # mean E[x | x_t] over the training set, exactly; covariance 0
            return known.law.denoiser(x_t, t)
        case Analytic():
            # mean E[x | x_t] under the population, exactly; covariance 0
            return known.density.denoiser(x_t, t)
        case Blend():
            # mean (1 - alpha) D_phi + alpha E[x | x_t]; covariance beta^2 Cov[x | x_t]
            return _blend(score, known, at)
        case KSample(n=n, shared=shared):
            # mean between D of the n references and E[x | x_t]: x stands among them for certain.
            # n = 1 is x, n -> infinity E[x | x_t] with covariance 0
            return _self_normalised(known.law, at, n, shared)
        case PosteriorK(k=k):
            # mean E[x | x_t]; covariance Cov[x | x_t] / k
            return (x + _drawn(known.law, at, k - 1)) / k
        case Own(ramp=ramp):
            # mean and covariance from those of x, in proportion, to D_own and 0
            a = torch.as_tensor(at.progress / ramp).clamp(max=1).to(x)
            return (1 - a) * x + a * known.own(x_t, t)
        case Windowed(inside=inside, outside=outside, t_low=low, t_high=high):
            # mean and covariance of the one or the other, by t
            level = t if at.start is None else at.start
            within = ((level > low) & (level <= high)).view(-1, *(1,) * (x.ndim - 1))
            return torch.where(within, estimate(inside, known, at), estimate(outside, known, at))
        case _:
            assert_never(score)


def _blend(score: Blend, known: Knowledge, at: Point) -> Tensor:
    """(1 - alpha) D_phi + alpha D_ref + beta (x - D_ref), or normal noise of that covariance."""
    alpha, beta, x = score.alpha, score.beta, at.x
    gaussian = score.residual == "gaussian"
    mean = 0 if alpha == 1 else (1 - alpha) * known.teachers[score.run](at.x_t, at.t)
    if gaussian:
        mean = mean + beta * known.law.posterior_noise(at.x_t, at.t, at.draw)
    else:
        mean = mean + beta * x
    rest = alpha if gaussian else alpha - beta  # on the line alpha = beta D_ref cancels
    return mean + rest * known.law.denoiser(at.x_t, at.t) if rest else mean


def _drawn(law: Posterior | Density, at: Point, count: int) -> Tensor:
    """The sum (B, ...) of `count` posterior draws, a few at a time: memory does not grow with
    count."""
    total = torch.zeros_like(at.x)
    keys = noise.words(at.draw, DRAWN, (-(-count // TOGETHER),)) >> 1
    keys[:1] = at.draw
    for start, key in zip(range(0, count, TOGETHER), keys, strict=True):
        draws = law.posterior_draws(at.x_t, at.t, key, min(TOGETHER, count - start))
        total += draws.sum(0)
    return total


def _self_normalised(law: Posterior | Density, at: Point, n: int, shared: bool) -> Tensor:
    """sum_j w_j x_j / sum_j w_j over x and n - 1 references, w_j = exp(-|x_t - x_j|^2 / (2 t^2)).

    Logits are taken beside x's own, |x_t - x_j|^2 - |x_t - x|^2 = |x - x_j|^2
    + 2 <x_t - x, x - x_j>, which loses no digits where t is small. Endless data have no set to
    draw references from but the batch; a row's own x is then left out of its draws.
    """
    finite = isinstance(law, Posterior)
    x, t = at.x.flatten(1), at.t
    pool = law.x.flatten(1) if finite else x
    z = at.x_t.flatten(1) - x
    rows = len(x) if shared else max(1, CHUNK // (n * x.shape[1]))
    count = n - 1 if shared else len(x) * (n - 1)
    # by the words' high bits: the lowest ones are alike under keys that differ in few bits
    chosen = noise.words(at.draw, REFERENCES, (count,)) * len(pool) >> 32
    row = torch.arange(len(x), device=x.device)[:, None]
    parts = []
    for i in range(0, len(x), rows):
        own, e = x[i : i + rows], z[i : i + rows]
        if shared:
            others = pool[chosen]  # (n - 1, d)
            apart = torch.cdist(own, others, compute_mode="donot_use_mm_for_euclid_dist").square()
            along = (e * own).sum(1, keepdim=True) - e @ others.T
        else:
            others = pool[chosen.view(len(x), n - 1)[i : i + rows]]  # (b, n - 1, d)
            offset = own[:, None] - others
            apart, along = offset.square().sum(2), torch.einsum("bd,bnd->bn", e, offset)
        logits = -(apart / 2 + along) / t[i : i + rows, None].square()
        if not finite:
            itself = chosen.view(1 if shared else len(x), n - 1) == row
            logits = logits.masked_fill(itself[i : i + rows], -torch.inf)
        w = torch.cat([logits.new_zeros(len(own), 1), logits], 1).softmax(1)
        mean = w[:, 1:] @ others if shared else torch.einsum("bn,bnd->bd", w[:, 1:], others)
        parts.append(w[:, :1] * own + mean)
    return torch.cat(parts).view_as(at.x)
