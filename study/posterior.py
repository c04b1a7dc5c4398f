"""The exact posterior over a finite training set, at the size of a data set and at every level.

x is one of the n training images, each as likely, and x_t = x + t z, z ~ N(0, I). Given x_t

    w_i = softmax_i(-|x_t - x_i|^2 / (2 t^2)),     D(x_t, t) = sum_i w_i x_i,
    Cov[x | x_t] = sum_i w_i (x_i - D)(x_i - D)^T,

by one product of the batch with the whole training set for the weights and one for each sum.

Only differences of logits decide, and t^2 divides them. About the data's mean they come from
<x_t - m, x_i - m> - |x_i - m|^2 / 2 in float32, which is off by some 1e-3 on colour images. That
is nothing against the distances between different images, but it hides those between
near-duplicates where t is small, so the likeliest few are compared again, by plain differences in
float64. TF32 would be garbage: it has to be off. In few dimensions many points lie close, so there
all logits come from plain differences.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from study import noise
from study.data import Dataset
from study.errors import StudyError
from study.mixtures import BETWEEN, Density, Level, column

CHUNK = 1 << 24  # weights of one block
FEW = 32  # dimensions
NEAR = 8  # likeliest images that are compared in float64; more near-duplicates than these blur
GROUP, MEMBER = 3010, 3011  # noise streams: the choice of a group of images, and within it


class Posterior:
    """p(x | x_t) over a finite training set.

    Every method takes x_t (B, ...) and a noise level t > 0, a float or (B,), in the units of x,
    and answers in the training set's type. Where the posterior is a point, mean and draws are that
    very image, bit for bit, and variance and noise are 0. Random draws are a function of `key`, an
    int64 scalar below 2^31 on x's device, whatever the size of a block.

    Besides x, its centred copy and what is returned, memory is bounded by a block of at most
    max(n, CHUNK) weights: 20 bytes each, or 45 for `posterior_noise`: 3/4 GiB while n is below
    CHUNK, for every batch. `posterior_draws` adds 60 k B sqrt(n) bytes.
    """

    @staticmethod
    def bytes(n: int, d: int) -> int:
        """Memory that it takes over n points of d numbers: three copies while it is made, and a
        block of weights."""
        return 12 * n * d + 50 * max(n, CHUNK)

    def __init__(self, x: Tensor) -> None:
        """x: training set (n, ...), float32."""
        self.x, self.flat = x, x.flatten(1)  # (n, d)
        self.mean_image = self.flat.mean(0)
        self.centred = self.flat - self.mean_image
        self.half_norm = self.centred.square().sum(1) / 2  # (n,)

    def weights(self, x_t: Tensor, t: Level) -> Tensor:
        """w_i (B, n)."""
        return torch.cat([logits.softmax(1) for logits, *_ in self._blocks(x_t, t)])

    def effective_samples(self, x_t: Tensor, t: Level) -> Tensor:
        """1 / sum_i w_i^2 (B,): as many equal weights are as spread; 1 is a point."""
        blocks = self._blocks(x_t, t)
        return torch.cat([1 / logits.softmax(1).square().sum(1) for logits, *_ in blocks])

    def denoiser(self, x_t: Tensor, t: Level) -> Tensor:
        """D(x_t, t) = E[x | x_t] (B, ...)."""
        D = [
            self.flat[top[:, 0]] + self._balanced(logits.softmax(1), top)
            for logits, top, *_ in self._blocks(x_t, t)
        ]
        return torch.cat(D).view(x_t.shape)

    def posterior_variance(self, x_t: Tensor, t: Level) -> Tensor:
        """Tr Cov[x | x_t] (B,).

        About the likeliest image x_*, Tr Cov = E|x - x_*|^2 - |D - x_*|^2, and
        |x - x_*|^2 = |x - x_t|^2 - |x_* - x_t|^2 + 2 <x - x_*, x_t - x_*>, whose first two are the
        logits: no product more than the mean's.
        """
        result = []
        for logits, top, x, s, _ in self._blocks(x_t, t):
            w, image = logits.softmax(1), self.flat[top[:, 0]]
            offset = self._balanced(w, top)  # D - x_*
            apart = -2 * s[:, 0] ** 2 * (w * logits).sum(1)
            result.append(apart + (offset * (2 * (x - image) - offset)).sum(1))
        return torch.cat(result).clamp(min=0)

    def posterior_draws(self, x_t: Tensor, t: Level, key: Tensor, k: int) -> Tensor:
        """k independent exact draws of x given each x_t (k, B, ...), the first of them the same
        for every k.

        Exponential races choose a group of some sqrt(n) images by its weight, then one of the
        group: the law of one race over all, from 2 sqrt(n) random numbers in place of n.
        """
        n = len(self.x)
        size = math.isqrt(n - 1) + 1
        groups = -(-n // size)
        first = noise.exponential(key, GROUP, (k, len(x_t), groups))
        second = noise.exponential(key, MEMBER, (k, len(x_t), size))
        index = []
        for logits, *_, rows in self._blocks(x_t, t):
            w = F.pad(logits.softmax(1), (0, groups * size - n)).view(-1, groups, size)
            group = (w.sum(2) / first[:, rows]).argmax(2)  # (k, b)
            w = w[torch.arange(len(w), device=w.device), group]  # (k, b, size)
            index.append(group * size + (w / second[:, rows]).argmax(2))
        return self.x[torch.cat(index, 1)]

    def posterior_noise(self, x_t: Tensor, t: Level, key: Tensor) -> Tensor:
        """Normal noise of mean 0 and covariance Cov[x | x_t] (B, ...): with xi_i ~ N(0, 1),
        sum_i sqrt(w_i) xi_i (x_i - D)."""
        result = []
        for logits, top, *_, rows in self._blocks(x_t, t):
            w = logits.softmax(1)
            # as coefficients of the x_i, which sum to 0
            xi = noise.normal(key, BETWEEN, w.shape, start=rows.start * w.shape[1])
            shares = w.sqrt().mul_(xi)
            shares = shares - shares.sum(1, keepdim=True) * w
            result.append(self._balanced(shares, top))
        return torch.cat(result).view(x_t.shape)

    def _blocks(
        self, x_t: Tensor, t: Level
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, slice]]:
        """In blocks of rows: log w_i - log w_* (b, n) and the likeliest image's index (b, 1), the
        points (b, d), their levels (b, 1), and which rows they are."""
        x_t, size = x_t.flatten(1).to(self.flat), max(1, CHUNK // len(self.x))
        t = column(t, x_t).expand(len(x_t), 1)
        for start in range(0, len(x_t), size):
            rows = slice(start, start + size)
            yield *self._logits(x_t[rows], t[rows]), x_t[rows], t[rows], rows

    def _logits(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log w_i - log w_* (b, n) at x (b, d), t (b, 1), and the likeliest (b, 1)."""
        if x.shape[1] <= FEW:
            apart = torch.cdist(x, self.flat, compute_mode="donot_use_mm_for_euclid_dist")
            nearest, top = apart.min(1, keepdim=True)
            return (nearest - apart) * (nearest + apart) / (2 * t**2), top
        with torch.autocast(x.device.type, enabled=False):
            joint = (x - self.mean_image) @ self.centred.T
        joint -= self.half_norm
        near = joint.topk(min(NEAR, len(self.x)), 1).indices
        squares = [(x.double() - self.flat[i]).square().sum(1) for i in near.unbind(1)]
        square = torch.stack(squares, 1)
        nearest, best = square.min(1, keepdim=True)
        top = near.gather(1, best)
        joint = (joint - joint.gather(1, top)).div_(t**2)
        exact = (nearest - square) / (2 * t.double() ** 2)
        return joint.scatter_(1, near, exact.to(joint)), top

    def _balanced(self, shares: Tensor, top: Tensor) -> Tensor:
        """sum_i a_i (x_i - x_*) (b, d) for coefficients a (b, n): x_*'s own is made minus the sum
        of the others, so that nothing cancels, and 0 stays 0, where x_* has all the weight."""
        shares = shares.scatter(1, top, 0.0)
        shares.scatter_(1, top, -shares.sum(1, keepdim=True))
        with torch.autocast(shares.device.type, enabled=False):
            return shares @ self.centred


@lru_cache(maxsize=2)
def law_of(dataset: Dataset) -> Posterior | Density:
    """What training draws x from, with its posterior: the training set, with its mirror images
    where they are drawn too, or endless data.

    Raises StudyError where the posterior over the training set has no room on its device.
    """
    if dataset.train is None:
        return dataset.density
    n, d = dataset.size, math.prod(dataset.shape)
    needed, free = Posterior.bytes(n, d), memory_left(dataset.train.device)
    if needed > free:
        raise StudyError(
            f"the exact posterior over {n:,} images of {d:,} numbers needs {needed / 2**30:.1f} "
            f"GiB, and {free / 2**30:.1f} are left; train on fewer images or smaller ones, on a "
            "device with more memory or with fewer workers"
        )
    return Posterior(dataset.at(torch.arange(n, device=dataset.train.device)))


def memory_left(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
