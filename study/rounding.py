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
from typing import Any

import torch
from torch import Tensor

from study import replicates
from study.data import Dataset
from study.factors import Continuous
from study.gradients import Pair, by_level, c_of, drawn_batches, gradient_of, levels_of, steps
from study.losses import Problem


def gradient_rounding(
    problem: Problem,
    exact: Problem,
    dataset: Dataset,
    N: float,
    progress: float,
    levels: Sequence[float],
    batches: int,
    rows: int,
    generator: torch.Generator,
) -> dict[str, Any]:
    """The errors above as lists over the pairs (r, t) nearest to `levels`, and under the law;
    value: the law's `error`. exact: the problem in float32. squared_bias is all but unbiased, also
    where noise makes it negative and bias None. step_over_c: the float32 residual's rms over
    pseudo-Huber's c: far below 1 the gradient is linear in it. None: not defined for the run."""
    stepped, c = not isinstance(problem.factors.objective, Continuous), c_of(problem, dataset)

    def probe(pair: Pair) -> replicates.Values:
        true, apart, squares = [], [], []
        for batch in drawn_batches(dataset, batches, rows, generator):
            at = levels_of(problem, batch, pair, N)
            h, _ = gradient_of(exact, batch, at, progress)
            true.append(h)
            apart.append(gradient_of(problem, batch, at, progress)[0] - h)
            if stepped:
                delta = steps(exact, batch, at, progress)
                off = steps(problem, batch, at, progress) - delta
                count = math.prod(delta.shape[:2])  # repeats and rows
                squares.append([replicates.square(v) / count for v in (off, delta)])
        # d has inner products of its own: as a difference of others' it would be lost in theirs
        gram = replicates.gram(torch.stack(true + apart))
        (hh, hd), (dh, dd) = gram.view(2, batches, 2, batches).transpose(1, 2)
        gg, gh = hh + hd + dh + dd, hh + dh
        residuals = torch.tensor(squares, dtype=torch.float64)  # (batches, 2)

        def values(kept: Tensor) -> replicates.Values:
            def single(gram: Tensor) -> float:
                return float(gram.diagonal()[kept].mean())

            def mean(gram: Tensor) -> float:
                return replicates.across(gram, kept)

            squared_bias = replicates.ratio(mean(dd), mean(hh))
            noise = replicates.variance(hh, kept)
            off, far = residuals[kept].mean(0).tolist() if stepped else (None, None)
            return {
                "bias": replicates.root(squared_bias),
                "squared_bias": squared_bias,
                "error": replicates.root(replicates.ratio(single(dd), single(hh))),
                "error_over_noise": replicates.root(replicates.ratio(single(dd), noise)),
                "cosine": replicates.cosine(mean(gh), mean(gg), mean(hh)),
                "cosine_batch": replicates.cosine(single(gh), single(gg), single(hh)),
                "residual_error": replicates.root(replicates.ratio(off, far)) if stepped else None,
                "step_over_c": math.sqrt(far) / c if stepped and c else None,
            }

        return replicates.jackknife(values, batches)

    return by_level(problem, N, levels, probe, "error")
