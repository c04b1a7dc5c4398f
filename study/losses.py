"""The losses: E[w(t, r) d(f(x_t, t), f^-(x_r, r))] with x_t = x + t z and x_r one solver step from
x_t to r along the slope (x_t - D^) / t. With D^ = x that is x + r z, consistency training; with a
teacher's D^ it is consistency distillation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from study import continuous, noise, schedules
from study.consistency import (
    Function,
    along,
    consistency,
    denoised,
    distance,
    scaled,
    skipped,
    solver_step,
    weight,
)
from study.data import Batch
from study.factors import Continuous, Denoising, Edm, Factors, Frozen, Sigma
from study.meaning import has_head, stepped
from study.scores import Knowledge, Point, estimate
from study.streams import beside

REPEATS = 2002  # the noise stream of further draws of x given x_t
REACH = 32.0  # of 10^6 outputs each is then near 2^-5, ten bits above where float16 thins out


@dataclass(frozen=True)
class Problem:
    """All that a loss reads besides the batch: the student, what the score knows, a target that
    is not the student itself (its running average, or a frozen model), the average whose own
    denoising head is a score."""

    factors: Factors
    sigma: Sigma  # with sigma_data filled in
    net: nn.Module
    known: Knowledge = Knowledge()
    frozen: Function | None = None
    average: nn.Module | None = None
    own: nn.Module | None = None

    def levels(self, batch: Batch, N: Tensor | float) -> tuple[Tensor, Tensor]:
        """(r, t) (B,) of a batch; where nothing is stepped r = t."""
        f = self.factors
        if not stepped(f):
            t = schedules.level(f.law, batch.u, self.sigma).float()
            return t, t
        return schedules.pair(f.discretization, f.law, batch.u, N, self.sigma)

    def losses(self, batch: Batch, N: Tensor | float, progress: Tensor | float = 1.0) -> Tensor:
        """The loss of each row (B,); N grid points, progress of training in [0, 1]."""
        return self.at_levels(batch, *self.levels(batch, N), progress)[0]

    def backward(
        self, batch: Batch, r: Tensor, t: Tensor, progress: Tensor | float = 1.0
    ) -> Tensor:
        """The mean loss (scalar) between levels r and t (B,); its gradient alone is in the
        parameters' .grad afterwards.

        Float16 holds 2^-24 to 2^16 only. The pass back through a network is linear in the
        gradient that it begins with, so that is brought to the length REACH by a power of two,
        from the batch alone, and the parameters' are divided by it again, in float32.
        """
        self.net.zero_grad()  # before the passes, which then have its room
        losses, outputs = self.at_levels(batch, r, t, progress)
        loss = losses.mean()
        if self.factors.precision != "float16":
            loss.backward()
            return loss.detach()
        first = torch.autograd.grad(loss, outputs)
        # in float64, as squares of float32 leave its range long before their roots do
        lengths = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in first]
        power = (REACH / torch.stack(lengths).norm()).log2().floor().clamp(-120, 120)
        scale = torch.exp2(power).float()
        torch.autograd.backward(outputs, torch._foreach_mul(first, scale))
        torch._foreach_div_([w.grad for w in self.net.parameters() if w.grad is not None], scale)
        return loss.detach()

    def at_levels(
        self, batch: Batch, r: Tensor, t: Tensor, progress: Tensor | float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of each row (B,) between levels r and t (B,) of the caller's choice, and the
        student's outputs (B, ...) that it is made of."""
        f, sigma, x, mask = self.factors, self.sigma, batch.x, batch.mask
        x_t = x + along(t, x) * batch.z
        head = has_head(f)
        with beside(x) as aside:
            with aside:
                if stepped(f):  # before the student's graph is held
                    targets = self.targets(batch, x_t, r, t, progress)
            inputs = scaled(x_t, t, sigma), t.log() / 4, mask
            outputs = list(self.net(*inputs, True)) if head else [self.net(*inputs)]
        F = outputs[0]
        if isinstance(f.objective, Denoising):
            # EDM's weighting makes the loss of F uniform over t
            error = denoised(F, x_t, t, sigma) - x
            return weight(Edm(), t, r, sigma) * error.square().flatten(1).sum(1), outputs
        if isinstance(f.objective, Continuous):
            D = estimate(f.score, self.known, Point(x, x_t, t, batch.draw, progress)).detach()
            result = continuous.losses(f.objective, self.net, F, x_t, t, D, sigma, mask, progress)
        elif isinstance(f.target, Frozen):
            # no step to divide by: the difference is not O(t - r), so the weight is 1
            with torch.no_grad():
                target = self.frozen(x_t, t)
            result = distance(f.distance, skipped(F, x_t, t, sigma), target)
        else:
            student = skipped(F, x_t, t, sigma)
            apart = [distance(f.distance, student, target) for target in targets]
            result = weight(f.weighting, t, r, sigma) * sum(apart) / len(apart)
        if head:
            with torch.no_grad():
                run = getattr(f.auxiliary.labels, "run", None)
                label = self.known.teachers[run](x_t, t) if run else x
            error = denoised(outputs[1], x_t, t, sigma) - label
            per_row = weight(Edm(), t, r, sigma) * error.square().flatten(1).mean(1)
            result = result + f.auxiliary.weight * per_row
        return result, outputs

    @torch.no_grad()
    def targets(
        self, batch: Batch, x_t: Tensor, r: Tensor, t: Tensor, progress: Tensor | float = 1.0
    ) -> list[Tensor]:
        """f^-(x_r, r) (B, ...), once per repeat: x itself, then further draws of x given x_t."""
        f, x, draw = self.factors, batch.x, batch.draw
        draws = [(x, draw)]
        if f.repeat > 1:
            keys = noise.words(draw, REPEATS, (f.repeat,)) >> 1
            more = self.known.law.posterior_draws(x_t, t, keys[0], f.repeat - 1)
            draws += zip(more, keys[1:], strict=True)
        result = []
        for clean, key in draws:

            def slope(y: Tensor, s: Tensor, clean: Tensor = clean, key: Tensor = key) -> Tensor:
                at = Point(clean, y, s, key, progress, start=t)
                return (y - estimate(f.score, self.known, at)) / along(s, y)

            x_r = solver_step(f.solver, slope, x_t, t, r)
            net = self.average or self.net
            result.append(consistency(net, x_r, r, self.sigma, batch.mask))  # same dropout mask
        return result
