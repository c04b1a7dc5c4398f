"""What half precision does to the gradient: a run's own step against the same step in float32.

Both are taken at the raw weights of one snapshot and on the same batches. Matched are the weights,
which are float32 in either case and the same tensors, those of the target's average and of the own
head's among them; x, z, t, r, the dropout mask and the score's randomness; and whatever is read of
other runs, a teacher's D or a source's labels, in the precision which that run was trained in. So
x_t is the same bit for bit, and x_r is too unless the score is the run's own head. What differs is
the arithmetic inside the run's networks, forward and backward: student, target and own head.
Outside of F everything is float32 in both, and float32 is the true one, without TF32.

With g_j and h_j the gradients of batch j in the run's precision and in float32, d_j = g_j - h_j,
and delta = f(x_t, t) - f^-(x_r, r), which is what the distance sees and gets small with t - r:
    bias = |E d| / |E h|                         what no number of steps averages away
    error = sqrt(E |d|^2 / E |h|^2)              of a single batch
    error_over_noise = sqrt(E |d|^2 / Var h)     Var h of the batch's own sampling
    cosine = <E g, E h> / (|E g| |E h|),  cosine_batch = E <g, h> / sqrt(E |g|^2 E |h|^2)
    residual_error = sqrt(E |delta_p - delta|^2 / E |delta|^2)
Rounding whose bias is small against 1 and whose error is far below the noise does no harm. What is
a square of an expectation is averaged over pairs of different batches, so that noise does not pass
for bias; standard errors are the jackknife's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from study import replicates
from study.gradients import Pair, Probe, Statistic
from study.losses import Problem
from study.replicates import Values


def gradient_rounding(probe: Probe, exact: Problem, levels: Sequence[float]) -> dict[str, Any]:
    """The errors above as lists over the pairs (r, t) nearest to `levels`, and under the law;
    value: the law's `error`. exact: the problem in float32. squared_bias is all but unbiased, also
    where noise makes it negative and bias None. step_over_c: the float32 residual's rms over
    pseudo-Huber's c: far below 1 the gradient is linear in it. None: not defined for the run."""
    twin, m = replace(probe, problem=exact), probe.batches

    def measured(pair: Pair) -> Statistic:
        true, apart, squares = [], [], []
        for batch in probe.drawn():
            at = probe.levels(batch, pair)
            h, _ = twin.gradient(batch, at)
            true.append(h)
            apart.append(probe.gradient(batch, at)[0] - h)
            if probe.stepped:
                delta = twin.steps(batch, at)
                off = probe.steps(batch, at) - delta
                count = math.prod(delta.shape[:2])  # repeats and rows
                squares.append([replicates.square(v) / count for v in (off, delta)])
        # d has inner products of its own: as a difference of others' it would be lost in theirs
        gram = replicates.gram(torch.stack(true + apart))
        (hh, hd), (dh, dd) = gram.view(2, m, 2, m).transpose(1, 2)
        gg, gh = hh + hd + dh + dd, hh + dh
        residuals = torch.tensor(squares, dtype=torch.float64)  # (batches, 2)

        def values(kept: Tensor) -> Values:
            def single(gram: Tensor) -> float:
                return float(gram.diagonal()[kept].mean())

            def mean(gram: Tensor) -> float:
                return replicates.across(gram, kept)

            squared_bias = replicates.ratio(mean(dd), mean(hh))
            noise = replicates.variance(hh, kept)
            residual_error = step = None
            if probe.stepped:
                off, far = residuals[kept].mean(0).tolist()
                residual_error, step = replicates.root(replicates.ratio(off, far)), math.sqrt(far)
            return {
                "bias": replicates.root(squared_bias),
                "squared_bias": squared_bias,
                "error": replicates.root(replicates.ratio(single(dd), single(hh))),
                "error_over_noise": replicates.root(replicates.ratio(single(dd), noise)),
                "cosine": replicates.cosine(mean(gh), mean(gg), mean(hh)),
                "cosine_batch": replicates.cosine(single(gh), single(gg), single(hh)),
                "residual_error": residual_error,
                "step_over_c": probe.over_c(step),
            }

        return values

    return probe.by_level(levels, measured, "error")
