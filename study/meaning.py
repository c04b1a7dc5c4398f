"""What factors mean: which values are the same training, which are never read, which runs they
name. The identity of a run rests on it."""

from __future__ import annotations

from typing import assert_never

from msgspec.structs import replace

from study.factors import (
    Analytic,
    Blend,
    Consistency,
    Continuous,
    Denoising,
    DenoisingHead,
    Ema,
    Empirical,
    Euler,
    Factors,
    FixedPoint,
    Frozen,
    KSample,
    Own,
    PosteriorK,
    Score,
    SingleSample,
    Stopgrad,
    Teacher,
    Windowed,
)
from study.subjects import Data, DdpmPP, FittedMixture, Mixture, Network, Unet


def estimates(score: Score) -> tuple[Score, ...]:
    """What a score is made of: a window's two, otherwise itself."""
    return (score.inside, score.outside) if isinstance(score, Windowed) else (score,)


def deterministic(score: Score) -> bool:
    """Whether D^ is a function of x_t and t alone: no variance given x_t."""
    match score:
        case Teacher() | Empirical() | Analytic():
            return True
        case Blend(beta=beta):
            return beta == 0
        case Windowed(inside=inside, outside=outside):
            return deterministic(inside) and deterministic(outside)
        case SingleSample() | KSample() | PosteriorK() | Own():
            return False
        case _:
            assert_never(score)


def reads_law(factors: Factors) -> bool:
    """Whether the score or its repeats need the posterior of what x is drawn from."""
    return factors.repeat > 1 or _reads_law(factors.score)


def _reads_law(score: Score) -> bool:
    match score:
        case Empirical() | KSample() | PosteriorK():
            return True
        case Blend(alpha=alpha, beta=beta, residual=residual):
            return alpha != beta or residual == "gaussian"
        case Windowed(inside=inside, outside=outside):
            return _reads_law(inside) or _reads_law(outside)
        case SingleSample() | Teacher() | Analytic() | Own():
            return False
        case _:
            assert_never(score)


def has_head(factors: Factors) -> bool:
    """Whether the network has a second, denoising head."""
    head = isinstance(factors.auxiliary, DenoisingHead)
    return head and "auxiliary" not in ignored(factors)


def updated(factors: Factors) -> bool:
    """Whether there is training: a run may be its first weights, or computed as a fixed point."""
    return factors.budget.images != 0 and not isinstance(factors.objective, FixedPoint)


def stepped(factors: Factors) -> bool:
    """Whether the loss takes a solver's step from t to r."""
    return isinstance(factors.objective, Consistency) and not isinstance(factors.target, Frozen)


def endless(data: Data) -> bool:
    """Whether every x is a fresh draw of a known population."""
    return isinstance(data, Mixture | FittedMixture) and data.samples is None


def misfit(network: Network, side: int) -> str | None:
    """Why the network can't take images of side x side pixels; None where it can."""
    match network:
        case Unet(patch=patch) if side % patch:
            return f"patch {patch} does not divide {side} pixels a side"
        case DdpmPP(mult=mult) if side % 2 ** (len(mult) - 1):
            return f"{side} pixels a side can't be halved for the {len(mult)} resolutions of mult"
        case DdpmPP(mult=mult, attention=attention):
            sides = [side >> level for level in range(len(mult))]
            if none := sorted(set(attention) - set(sides)):
                return f"attention at {none}; on {side} x {side} images it has {sides}"
    return None


def plain_score(score: Score, data: Data) -> Score:
    """The same estimate in fewest words."""
    match score:
        case (
            Blend(alpha=1, beta=1, residual="posterior", run=None) | PosteriorK(k=1) | KSample(n=1)
        ):
            return SingleSample()
        case Blend(alpha=0, beta=0, run=str(run)):
            return Teacher(run=run)
        case Blend(alpha=1, beta=0):
            return Analytic() if endless(data) else Empirical()
        case Blend(beta=0, residual="gaussian"):
            return replace(score, residual="posterior")
        case Windowed(inside=inside, outside=outside):
            inside, outside = plain_score(inside, data), plain_score(outside, data)
            return inside if inside == outside else replace(score, inside=inside, outside=outside)
        case _:
            return score


def simplest(factors: Factors) -> Factors:
    """The same training in fewest words, so that what means the same is one run.

    A Heun step with D^ = x is an Euler step, losses of equal targets are one loss; an average
    that forgets everything is the student; one std stands for equal ones, no weights for equal;
    resolutions with attention have no order.
    """
    if isinstance(factors.target, Ema) and factors.target.mu == 0:
        factors = replace(factors, target=Stopgrad())
    score, sigma = plain_score(factors.score, factors.data), factors.sigma
    if isinstance(score, Windowed) and score.t_low <= sigma.min and score.t_high >= sigma.max:
        score = score.inside  # the window holds every level
    if score != factors.score:
        factors = replace(factors, score=score)
    if isinstance(score, SingleSample):
        factors = replace(factors, solver=Euler())
    if deterministic(score):
        factors = replace(factors, repeat=1)
    data, network = factors.data, factors.network
    if isinstance(network, DdpmPP):
        attention = tuple(sorted(set(network.attention), reverse=True))
        factors = replace(factors, network=replace(network, attention=attention))
    if not isinstance(data, Mixture):
        return factors
    std = data.std
    if isinstance(std, tuple) and len(std) == len(data.means) and len(set(std)) == 1:
        std = std[0]
    weights = data.weights
    if weights and len(weights) == len(data.means) and len(set(weights)) == 1:
        weights = None
    return replace(factors, data=replace(data, std=std, weights=weights))


STEP = ("score", "repeat", "solver", "discretization", "weighting")  # how a consistency loss steps
LOSS = (*STEP, "target", "distance")
TRAINED = ("network", "budget", "init", "target", "law", "weighting", "auxiliary", "dropout",
           "optimizer", "batch", "weights_ema", "precision", "data_stream", "repeat")  # fmt: skip


UNTRAINED = ("data", "network", "budget", "objective", "init", "weights_ema", "precision",
             "sigma")  # fmt: skip


def ignored(factors: Factors) -> tuple[str, ...]:
    """The factors that this run's budget, objective or target never reads; they don't enter its
    id."""
    if factors.budget.images == 0:  # it is its initial weights
        return tuple(f for f in factors.__struct_fields__ if f not in UNTRAINED)
    match factors.objective:
        case Denoising():
            return (*LOSS, "auxiliary")
        case Continuous():
            return tuple(k for k in LOSS if k != "score")
        case FixedPoint():
            return TRAINED
    return STEP if isinstance(factors.target, Frozen) else ()


def references(factors: Factors) -> dict[str, str]:
    """The sources this run reads, by the key path of the value that names them, ignored factors
    left out."""
    unread, found = ignored(factors), {}
    for name in ("score", "init", "target", "auxiliary"):
        value = getattr(factors, name)
        parts = {name: value} | {
            f"{name}.{p}": getattr(value, p, None) for p in ("inside", "outside", "labels")
        }
        if name not in unread:
            found |= {k: v.run for k, v in parts.items() if getattr(v, "run", None)}
    return found
