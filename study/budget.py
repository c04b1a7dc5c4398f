"""The ledger: what a run has spent, in four currencies that are never mixed.

images: training images seen (= updates at equal batch). passes: network evaluations per image, a
forward counting 1 and a backward 2, so CT costs 4 (student forward and backward, target forward),
CD along a teacher 5 (6 with Heun's second slope), denoising 3; K repeats pay for K targets, a
differentiated tangent counts 2. flops: multiply-adds counted twice,
measured on one real step with torch's own counter. seconds: training only, evaluation and saving
left out. What the sources of a run spent stands in their own ledgers; the analysis adds it up.
"""

from __future__ import annotations

from collections.abc import Iterable

from study.factors import (
    Continuous,
    Denoising,
    Factors,
    FromRun,
    Frozen,
    Heun,
    Own,
    Score,
    Windowed,
)
from study.values import Value

BACKWARD = 2  # forwards that a backward pass is worth
TANGENT = 2  # of which one is the target itself


class Spend(Value, frozen=True):
    """A run's own spend so far."""

    images: int = 0
    updates: int = 0
    passes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def plus(self, images: int, passes: int, flops: float, seconds: float) -> Spend:
        """The spend after one more update."""
        return Spend(
            images=self.images + images,
            updates=self.updates + 1,
            passes=self.passes + passes * images,
            flops=self.flops + flops,
            seconds=self.seconds + seconds,
        )


def score_passes(score: Score) -> int:
    """Network evaluations in one D^."""
    if isinstance(score, Windowed):  # both sides are evaluated, and one is chosen
        return score_passes(score.inside) + score_passes(score.outside)
    return int(isinstance(score, Own) or bool(getattr(score, "run", None)))


def passes(factors: Factors) -> int:
    """Network evaluations per training image."""
    student = 1 + BACKWARD
    labels = getattr(factors.auxiliary, "labels", None)
    if isinstance(factors.objective, Denoising):
        return student
    student += isinstance(labels, FromRun)
    if isinstance(factors.objective, Continuous):
        return student + TANGENT + score_passes(factors.score)
    if isinstance(factors.target, Frozen):
        return student + 1
    slopes = 2 if isinstance(factors.solver, Heun) else 1
    return student + factors.repeat * (1 + slopes * score_passes(factors.score))


def snapshot_images(images: int, batch: int, points: Iterable[float]) -> dict[int, float]:
    """Image counts at which a snapshot is due, in whole batches, and the share each stands for."""
    if not images:
        return {0: 1.0}
    return {max(1, round(at * images / batch)) * batch: at for at in sorted(points)}
