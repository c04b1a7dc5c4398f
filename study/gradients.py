"""Probes of the training gradient at fixed weights: where its noise comes from, which way two
scores push, and how their losses and gradients come together as the grid becomes finer.

Replicates j = 1..m are independent batches of B images drawn with replacement, each with noise,
times, dropout mask and score randomness of its own; g_j is the gradient of batch j's mean loss.
What has to be free of noise is averaged over pairs of different replicates, before any ratio:
    signal = |E g|^2 = mean_{j != k} <g_j, g_k>,
    total = B Var g = B sum_j |g_j - mean g|^2 / (m - 1), the variance of one image's gradient.
Standard errors are the jackknife's, which leaves out one replicate at a time.

Noise, at r and t fixed or under the law that training draws them from. Given x_t the clean x is
itself a draw from the posterior, so a second draw x'' with z'' = (x_t - x'') / t gives another
batch at the same x_t, and half the mean squared difference of such a pair is a variance:
    total = estimator + dropout + draw,
    estimator              given (t, x_t, mask): x and the score's own randomness drawn again,
    estimator + dropout    given (t, x_t): the mask as well,
    draw                   the rest: of x_t, and under the law of t,
    rho = estimator / total,    rho_adam: the same of g / (sqrt(v) + eps), v Adam's second moment,
    snr = signal / total,       step: rms of |f(x_t, t) - f^-(x_r, r)|, also over pseudo-Huber's c.
A score that only sees x_t has an estimator's part of exactly 0. References that a whole batch
shares are drawn again as one set: their common noise counts B times.

Cosine of the mean gradients of two scores, a_j and b_j on the same batches:
    <E a, E b> / sqrt(|E a|^2 |E b|^2), all three by mean_{j != k}, which shared noise can't reach.

Slopes: at each N, on the same batches, the relative differences |L - L'| / L' of the mean losses
and |E d| / |E g'| of the gradients, d_j = g_j - g'_j; a loss is here the mean over DRAWS draws of
x given x_t, which has the same expectation and less noise. At one smooth f, and for scores of the
same mean given x_t, the difference of the losses falls as fast as they do: their ratio does not
vanish. That of the gradients falls like 1 / N under L2, where only E f^-(x_r) - f^-(E x_r) is left
of it, and stays under a norm. The powers of N are fitted to the ratio, and to the square of the
gradients', which is all but unbiased where noise makes it negative too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from torch import Tensor

from study import factors, meaning, replicates, schedules
from study.consistency import along, consistency
from study.data import Batch, Dataset
from study.factors import Score
from study.losses import Problem
from study.replicates import Values
from study.scores import Point, estimate

DRAWS = 8  # of x given x_t, in the slopes' losses

Pair = tuple[float, float] | None  # levels (r, t); None: each row's own, from the law
Levels = tuple[Tensor, Tensor]  # r and t of a batch's rows, (B,) each
Statistic = Callable[[Tensor], Values]  # of the replicates kept, given by their indices


@dataclass(frozen=True)
class Probe:
    """What is probed: the loss at fixed weights, at N grid points and at `progress` of training,
    on `batches` independent batches of `rows` rows."""

    problem: Problem
    dataset: Dataset
    N: float
    progress: float
    batches: int
    rows: int
    generator: torch.Generator

    @property
    def stepped(self) -> bool:
        """Whether the loss is of a step from t to r."""
        return not isinstance(self.problem.factors.objective, factors.Continuous)

    def under(self, **changes: object) -> Probe:
        """The same under other factors, at the same weights."""
        f = msgspec.structs.replace(self.problem.factors, **changes)
        return replace(self, problem=replace(self.problem, factors=f))

    def key(self) -> Tensor:
        """A key of a mask or of a score's randomness."""
        return torch.randint(2**31, (), generator=self.generator, device=self.generator.device)

    def drawn(self) -> Iterator[Batch]:
        """The batches: training images drawn with replacement, or endless data."""
        kwargs = {"generator": self.generator, "device": self.generator.device}
        for _ in range(self.batches):
            x = self.dataset.draw(self.rows, self.generator)
            z = torch.randn(x.shape, **kwargs)
            u = torch.rand(self.rows, dtype=torch.float64, **kwargs)
            yield Batch(x, z, u, self.key(), self.key())

    @torch.no_grad()
    def redrawn(self, batch: Batch, t: Tensor) -> Batch:
        """The batch with x and the score's randomness drawn again given exactly (t, x_t) and the
        mask.

        A row whose x'' is the same image, or whose D^ is the same to the last bit, keeps x and z:
        x'' + t z'' is x_t up to rounding only, which would pass for noise.
        """
        f, known, x = self.problem.factors, self.problem.known, batch.x
        x_t, draw = x + along(t, x) * batch.z, self.key()
        new = known.law.posterior_draws(x_t, t, self.key(), 1)[0]
        same = (new == x).flatten(1).all(1)
        if not isinstance(getattr(f.auxiliary, "labels", None), factors.FromData):
            D = estimate(f.score, known, Point(x, x_t, t, batch.draw, self.progress))
            D_new = estimate(f.score, known, Point(new, x_t, t, draw, self.progress))
            same |= (D == D_new).flatten(1).all(1)
        same = along(same, x)
        z = torch.where(same, batch.z, (x_t - new) / along(t, x))
        return replace(batch, x=torch.where(same, x, new), z=z, draw=draw)

    def levels(self, batch: Batch, pair: Pair) -> Levels:
        """(r, t) of the batch."""
        if pair is None:
            return self.problem.levels(batch, self.N)
        return tuple(torch.full_like(batch.u, level, dtype=torch.float32) for level in pair)

    def pairs(self, levels: Sequence[float]) -> list[tuple[float, float]]:
        """The pairs (r, t) of training whose ln t is nearest to that of each level, each once."""
        f, sigma, N = self.problem.factors, self.problem.sigma, self.N
        asked = torch.tensor(levels, dtype=torch.float64)
        if not self.stepped:
            r = t = asked.float()
        elif isinstance(f.discretization, factors.EctMapping):  # any t is one of training
            u = (asked / sigma.min).log() / math.log(sigma.max / sigma.min)
            r, t = schedules.pair(f.discretization, factors.LogUniform(), u, N, sigma)
        else:
            grid = schedules.karras(torch.arange(N), N, sigma).float()
            i = (asked[:, None].log() - grid[1:].double().log()).abs().argmin(1)
            r, t = grid[i], grid[i + 1]
        return list(dict.fromkeys(zip(r.tolist(), t.tolist(), strict=True)))

    def gradient(self, batch: Batch, at: Levels) -> tuple[Tensor, float]:
        """The gradient (P,) of a batch's mean loss in all parameters, and that loss."""
        loss = self.problem.backward(batch, *at, self.progress)
        weights = self.problem.net.parameters()
        parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        return torch.cat([g.flatten() for g in parts]), float(loss)

    @torch.no_grad()
    def steps(self, batch: Batch, at: Levels) -> Tensor:
        """f(x_t, t) - f^-(x_r, r) of each repeat and row, (repeats, B, ...)."""
        (r, t), p = at, self.problem
        x_t = batch.x + along(t, batch.x) * batch.z
        student = consistency(p.net, x_t, t, p.sigma, batch.mask)
        return student - torch.stack(p.targets(batch, x_t, r, t, self.progress))

    def over_c(self, step: float | None) -> float | None:
        """A step over pseudo-Huber's c; None where there is no step, or no c."""
        c0 = getattr(self.problem.factors.distance, "c0", None)
        if step is None or c0 is None:
            return None
        return step / (c0 * math.prod(self.dataset.shape) ** 0.5)

    def by_level(
        self, levels: Sequence[float], measured: Callable[[Pair], Statistic], name: str
    ) -> dict[str, Any]:
        """What is measured at every pair of levels, as lists, and under the law, with standard
        errors; value: the law's NAME."""
        pairs = self.pairs(levels)
        *found, law = (
            replicates.jackknife(measured(pair), self.batches) for pair in (*pairs, None)
        )
        where = {"sigma": [t for _, t in pairs], "r": [r for r, _ in pairs], "N": self.N}
        lists = {key: [values[key] for values in found] for key in law}
        return {**where, **lists, "law": law, "value": law[name]}


def gradient_noise(
    probe: Probe, levels: Sequence[float], second_moment: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """The parts of the gradient's variance: lists over the pairs (r, t) nearest to `levels`, and
    under the law; value: the law's rho. second_moment: Adam's v by parameter name. What the run
    does not define, and a ratio to nothing, is None."""
    f, rows, scale = probe.problem.factors, probe.rows, None
    if second_moment is not None:
        v = [second_moment[name].flatten() for name, _ in probe.problem.net.named_parameters()]
        scale = 1 / (torch.cat(v).double().sqrt() + f.optimizer.eps).to(probe.generator.device)

    def measured(pair: Pair) -> Statistic:
        made, squares = [], defaultdict(list)
        for batch in probe.drawn():
            at = probe.levels(batch, pair)
            again = probe.redrawn(batch, at[1])
            g, _ = probe.gradient(batch, at)
            apart = g - probe.gradient(again, at)[0]
            made.append(g)
            squares["estimator"].append(replicates.square(apart) / 2)
            if scale is not None:
                squares["scaled"].append(replicates.square(apart * scale) / 2)
            mask = probe.key()  # drawn in any case: the batches after it are the same for all
            if f.dropout:
                apart = g - probe.gradient(replace(again, mask=mask), at)[0]
            squares["within"].append(replicates.square(apart) / 2)
            if probe.stepped:
                far = probe.steps(batch, at)
                squares["step"].append(replicates.square(far) / math.prod(far.shape[:2]))
        gradients = torch.stack(made)
        gram = replicates.gram(gradients)
        scaled = None if scale is None else replicates.gram(gradients, scale)
        columns = {name: torch.tensor(s, dtype=torch.float64) for name, s in squares.items()}

        def parts(kept: Tensor) -> Values:
            mean = {name: float(column[kept].mean()) for name, column in columns.items()}
            total, signal = rows * replicates.variance(gram, kept), replicates.across(gram, kept)
            estimator, within = rows * mean["estimator"], rows * mean["within"]
            adam = (
                None
                if scaled is None
                else replicates.ratio(mean["scaled"], replicates.variance(scaled, kept))
            )
            step = math.sqrt(mean["step"]) if probe.stepped else None
            return {
                "estimator": estimator,
                "dropout": within - estimator,
                "draw": total - within,
                "total": total,
                "rho": replicates.ratio(estimator, total),
                "rho_adam": adam,
                "signal": signal,
                "snr": replicates.ratio(signal, total),
                "step": step,
                "step_over_c": probe.over_c(step),
            }

        return parts

    return probe.by_level(levels, measured, "rho")


def gradient_cosine(
    probe: Probe, score: Score, against: Score, levels: Sequence[float]
) -> dict[str, Any]:
    """The cosine of two scores' mean gradients, per level as above and under the law (value), with
    the snr of each. None where noise leaves a squared length that is not positive."""
    sides, rows = [probe.under(score=kind) for kind in (score, against)], probe.rows

    def measured(pair: Pair) -> Statistic:
        (a, ab), (_, b) = _compared(sides, probe.drawn(), pair)[0]

        def cosine(kept: Tensor) -> Values:
            aa, bb = replicates.across(a, kept), replicates.across(b, kept)
            return {
                "cosine": replicates.cosine(replicates.across(ab, kept), aa, bb),
                "snr_score": replicates.ratio(aa, rows * replicates.variance(a, kept)),
                "snr_against": replicates.ratio(bb, rows * replicates.variance(b, kept)),
            }

        return cosine

    return probe.by_level(levels, measured, "cosine")


def gradient_slopes(
    probe: Probe, score: Score, against: Score, Ns: Sequence[int]
) -> dict[str, Any]:
    """How far two scores' losses and gradients are apart under the law, as lists over N, and the
    powers of N by which they fall; value: the gradients'. gradient_difference is None where noise
    makes its square negative; predicted_* are None where no one power is expected."""
    drawn = list(probe.drawn())
    sides = [
        probe.under(score=kind, repeat=1 if meaning.deterministic(kind) else DRAWS)
        for kind in (score, against)
    ]

    def measured(N: int) -> Statistic:
        ((a, ab), (ba, b)), losses = _compared([replace(side, N=N) for side in sides], drawn, None)

        def values(kept: Tensor) -> Values:
            first, second = losses[kept].mean(0).tolist()
            square = replicates.ratio(
                replicates.across(a + b - ab - ba, kept), replicates.across(b, kept)
            )
            return {
                "loss_score": first,
                "loss_against": second,
                "loss_ratio": replicates.ratio(abs(first - second), second),
                "gradient_difference": replicates.root(square),
                "squared_difference": square,
            }

        return values

    at = [measured(N) for N in Ns]
    found = [replicates.jackknife(values, probe.batches) for values in at]

    def powers(kept: Tensor) -> Values:
        left = [values(kept) for values in at]
        ratio, square = (
            replicates.power(Ns, [v[name] for v in left], [v[f"{name}_se"] for v in found])
            for name in ("loss_ratio", "squared_difference")
        )
        return {"slope_loss": ratio, "slope_gradient": None if square is None else square / 2}

    fitted, distance = replicates.jackknife(powers, probe.batches), probe.problem.factors.distance
    between = isinstance(distance, factors.PseudoHuber)  # L2 at small steps, a norm at large ones
    fall = -1.0 if isinstance(distance, factors.L2) else 0.0
    return {
        "N": list(Ns),
        **{name: [values[name] for values in found] for name in found[0]},
        **fitted,
        "predicted_loss": None if between else 0.0,
        "predicted_gradient": None if between else fall,
        "value": fitted["slope_gradient"],
    }


def _compared(
    sides: Sequence[Probe], drawn: Iterable[Batch], pair: Pair
) -> tuple[Tensor, Tensor]:
    """Two losses at the same weights on the same batches: inner products of their gradients
    (2, 2, m, m), and losses (m, 2)."""
    gradients, losses = ([], []), ([], [])
    for batch in drawn:
        at = sides[0].levels(batch, pair)
        for i, side in enumerate(sides):
            g, loss = side.gradient(batch, at)
            gradients[i].append(g)
            losses[i].append(loss)
    gram, m = replicates.gram(torch.stack(gradients[0] + gradients[1])), len(losses[0])
    return gram.view(2, m, 2, m).transpose(1, 2), torch.tensor(losses, dtype=torch.float64).T
