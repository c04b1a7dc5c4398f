"""Combinations that mean nothing, refused before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping

from study.budget import snapshot_images
from study.domains import (
    CHANNELS,
    SIDE,
    Where,
    check_counts,
    check_extractors,
    images_in,
    references_in,
)
from study.errors import StudyError, nearest
from study.extractors.names import check_extractor
from study.factors import (
    MOST_TERMS,
    Analytic,
    Blend,
    Consistency,
    Continuous,
    Denoising,
    DenoisingHead,
    EctMapping,
    Empirical,
    Factors,
    FixedPoint,
    FromRun,
    Frozen,
    Heun,
    KSample,
    Own,
    PosteriorK,
    Progressive,
    Random,
    Score,
    SingleSample,
    Windowed,
)
from study.limits import check_sample
from study.meaning import deterministic, endless, ignored, misfit, plain_score, references
from study.metrics import Measure
from study.settings import IN_FEATURES, PROBES, filled, settings_of, snapshot_points
from study.spec import Primary, Recipe
from study.subjects import FittedMixture, Mixture, Mlp

NEEDS = {
    "fid": "images",
    "kid": "images",
    "sliced_wasserstein": "a mixture of vectors",
    "mode_mass": "a mixture of vectors",
    "map_error": "a mixture or fitted_mixture, whose exact map is known",
    "memorisation": "finite images",
    "coverage": "images",
    "pushforward": "endless one-dimensional data",
}


def check_recipe(
    recipe: Recipe, where: str, sources: Mapping[str, Recipe], variants: Mapping[str, object]
) -> None:
    """What holds for one recipe among the sources of its cell; where: its place in the file."""
    factors, data = recipe.factors, recipe.factors.data
    network = factors.network
    kind = data.__struct_config__.tag
    score = None if "score" in ignored(factors) else factors.score
    if isinstance(data, Mixture | FittedMixture):
        check_sample(data, where)
    if isinstance(data, Mixture):
        check_mixture(data, where)
        if not isinstance(network, Mlp):
            given = network.__struct_config__.tag
            raise StudyError(f"{where}.network: a {given} needs images; use mlp on a {kind}")
    if factors.augment == "flip" and isinstance(data, Mixture | FittedMixture):
        raise StudyError(
            f"{where}.augment: flip is for real images; draws of a {kind} follow its own density, "
            "and mirrored ones would not"
        )
    if score:
        check_score(score, factors, f"{where}.score")
    check_objective(factors, where)
    side = SIDE.get(getattr(data, "of", data).__struct_config__.tag)
    if side and (why := misfit(network, side)):
        raise StudyError(f"{where}.network: {why}")
    steps = factors.discretization
    read = "discretization" not in ignored(factors)
    if read and isinstance(steps, Progressive) and steps.s0 > steps.s1 + 1:
        raise StudyError(
            f"{where}.discretization: s0 {steps.s0} is above s1 + 1 = {steps.s1 + 1}: N would fall"
        )
    if isinstance(factors.objective, Denoising) and recipe.role == "student":
        raise StudyError(
            f"{where}.objective: denoising is for sources; variants are consistency models, "
            "compared at one and two steps"
        )
    if factors.budget.images == 0 and isinstance(factors.init, Random):
        raise StudyError(f"{where}.budget: no images, and random weights; give it an init")
    for factor, name in references(factors).items():
        check_reference(factors, f"{where}.{factor}.run", factor, name, sources, variants)
    asked = list(settings_of(recipe.measure, factors, recipe.role))
    points = snapshot_points(recipe.measure, asked, factors, recipe.role)
    images = factors.budget.images
    snapshots = snapshot_images(images, factors.batch, points)
    if len(snapshots) < len(points) or len({f"{at:.3f}" for at in points}) < len(points):
        raise StudyError(
            f"{where}: measure.at: {sorted(points)} name the same update, or agree to three "
            f"decimals; {images} images are {images // factors.batch} updates"
        )
    for name in dict.fromkeys(n for settings in asked for n in settings.consults):
        kind = next(s.record["kind"] for s in asked if name in s.consults)
        check_reference(factors, f"{where} (by measure.{kind})", "score", name, sources, variants)
    for kind in PROBES:
        ask = getattr(recipe.measure, kind)
        if ask and any(s.record["kind"] == kind for s in asked):
            for field in ("score", "against"):
                if isinstance(given := getattr(ask, field, None), Score):
                    place = f"{where} (by measure.{kind}.{field})"
                    check_score(plain_score(given, data), factors, place)
    for settings in asked:
        if settings.record["ema"] not in (*factors.weights_ema, "raw"):
            raise StudyError(
                f"{where}: measure asks for ema {settings.record['ema']}; weights_ema is "
                f"{list(factors.weights_ema)}"
            )


def check_reference(
    factors: Factors,
    where: str,
    factor: str,
    name: str,
    sources: Mapping[str, Recipe],
    variants: Mapping[str, object],
) -> None:
    """The source that a factor names exists and is of use there."""
    if name in variants:
        raise StudyError(
            f"{where}: {name!r} is a variant; a variant that others need gets a source twin: "
            f"sources: {{{name}_first: {{from: {name}}}}}"
        )
    if name not in sources:
        raise StudyError(f"{where}: no source {name!r}; {nearest(name, sources)}")
    source = sources[name].factors
    top = factor.split(".")[0]
    denoising = (Denoising, "denoising")
    wanted = {
        "score": denoising,
        "auxiliary": denoising,
        "target": (Consistency | Continuous, "consistency"),
    }.get(top)
    if isinstance(source.objective, FixedPoint):
        raise StudyError(f"{where}: {name!r} is a fixed point; it has no weights to read")
    if wanted and not isinstance(source.objective, wanted[0]):
        raise StudyError(
            f"{where}: {name!r} is trained by {source.objective.__struct_config__.tag}; "
            f"{wanted[1]} expected"
        )
    if source.data != factors.data:
        raise StudyError(f"{where}: {name!r} is trained on other data")
    if (source.sigma.min, source.sigma.max) != (factors.sigma.min, factors.sigma.max):
        raise StudyError(f"{where}: {name!r} is trained on other noise levels (sigma)")
    if factor == "init" and source.network != factors.network:
        raise StudyError(f"{where}: {name!r} has another network; weights can't be copied")


def check_score(score: Score, factors: Factors, where: str) -> None:
    """The score has what it needs: a teacher, finite data, a known density."""
    data = factors.data
    kind, unknown = data.__struct_config__.tag, not isinstance(data, Mixture | FittedMixture)
    match score:
        case Analytic() if unknown:
            raise StudyError(
                f"{where}: analytic needs a known density (mixture, fitted_mixture), not {kind}"
            )
        case Empirical() if endless(data):
            raise StudyError(
                f"{where}: empirical needs finite data; give the mixture `samples` or use the "
                "analytic score"
            )
        case KSample(n=n) if n > references_in(factors):
            raise StudyError(
                f"{where}: n = {n} references, and there are {references_in(factors)} (training "
                "points, or of endless data the batch); the exact mean over all is the score "
                "empirical, or analytic"
            )
        case Blend(alpha=alpha, run=None) if alpha != 1:
            raise StudyError(
                f"{where}: blend needs `run`, the denoiser that {1 - alpha:g} of the mean comes "
                "from; alpha: 1 needs none"
            )
        case Blend(alpha=1, run=str(run)):
            raise StudyError(f"{where}: at alpha 1 the denoiser {run!r} is never read; drop `run`")
        case Own():
            head = factors.auxiliary
            if not isinstance(head, DenoisingHead) or isinstance(head.labels, FromRun):
                raise StudyError(
                    f"{where}: own reads the student's own denoising head; add auxiliary: "
                    "denoising_head, with labels: data"
                )
        case Windowed(inside=inside, outside=outside, t_low=low, t_high=high):
            sigma = factors.sigma
            if not low < high or high <= sigma.min or low >= sigma.max:
                raise StudyError(
                    f"{where}: the window ({low:g}, {high:g}] holds no level of "
                    f"[{sigma.min:g}, {sigma.max:g}]"
                )
            check_score(inside, factors, f"{where}.inside")
            check_score(outside, factors, f"{where}.outside")
    heun = isinstance(factors.solver, Heun) and "solver" not in ignored(factors)
    if heun and not deterministic(score) and not isinstance(score, SingleSample):
        raise StudyError(
            f"{where}: heun asks for the slope twice, and a {score.__struct_config__.tag} with "
            "noise would draw twice; use solver: euler"
        )


def check_objective(factors: Factors, where: str) -> None:
    """What the objective can't be combined with."""
    data, solver = factors.data, factors.solver
    if isinstance(factors.objective, Continuous) and isinstance(factors.target, Frozen):
        raise StudyError(f"{where}.target: the continuous objective has its own target; drop it")
    if not isinstance(factors.objective, FixedPoint):
        return
    kinds = SingleSample | PosteriorK | Analytic
    if not isinstance(data, Mixture) or len(data.means[0]) != 1 or data.samples:
        raise StudyError(
            f"{where}.objective: fixed_point needs endless one-dimensional data: a mixture with "
            "means of one number and no `samples`"
        )
    if not isinstance(factors.score, kinds):
        raise StudyError(
            f"{where}.score: a fixed point is known for single_sample, posterior_k and analytic"
        )
    modes, k = len(data.means), getattr(factors.score, "k", 1)
    if math.comb(k + modes - 1, modes - 1) > MOST_TERMS:
        raise StudyError(
            f"{where}.score: the mean of {k} draws from {modes} modes has more than {MOST_TERMS} "
            "components; take a smaller k"
        )
    heun = isinstance(solver, Heun) and isinstance(factors.score, PosteriorK)
    if heun or isinstance(factors.discretization, EctMapping):
        raise StudyError(f"{where}: a fixed point is known on a grid of N points, with euler")


def check_mixture(data: Mixture, where: str) -> None:
    """As many stds and weights as means, all means of one dimension."""
    modes, dims = len(data.means), {len(m) for m in data.means}
    if len(dims) > 1:
        raise StudyError(f"{where}: data.means: of {sorted(dims)} numbers; one dimension expected")
    for key in ("std", "weights"):
        given = getattr(data, key)
        if isinstance(given, tuple) and len(given) != modes:
            raise StudyError(f"{where}: data.{key}: {len(given)} given for {modes} means")


def check_measure(measure: Measure, factors: Factors, where: Where) -> None:
    """Metrics fit the kind of data, the extractor its domain, the samples the references."""
    data = factors.data
    kind = data.__struct_config__.tag
    offered = {*measure.__struct_fields__} - {*NEEDS}
    if isinstance(data, Mixture):
        line = len(data.means[0]) == 1 and data.samples is None
        offered |= {"sliced_wasserstein", "mode_mass", "map_error", *(["pushforward"] * line)}
    else:
        offered |= {"fid", *IN_FEATURES}
    if isinstance(data, FittedMixture):
        offered.add("map_error")
    if not isinstance(data, Mixture) and not endless(data):
        offered.add("memorisation")
    for metric, needs in NEEDS.items():
        if getattr(measure, metric) and metric not in offered:
            raise StudyError(f"{where(metric)}: {metric} needs {needs}; the data are {kind}")
    for metric in measure.__struct_fields__:
        mid = getattr(getattr(measure, metric), "mid", None)
        if mid is not None and not factors.sigma.min < mid < factors.sigma.max:
            raise StudyError(f"{where(f'{metric}.mid')}: {mid} is not between sigma's min and max")
    real = data.of.__struct_config__.tag if isinstance(data, FittedMixture) else kind
    for metric in ("fid", *IN_FEATURES):
        if ask := filled(measure, metric):
            if None in (ask.extractor, ask.samples):
                raise StudyError(f"{where(metric)}: needs extractor and samples, or a fid")
            check_extractor(ask.extractor, ask.weights, where(metric))
    if real in SIDE:
        check_extractors(measure, (CHANNELS[real], SIDE[real]), real, where)
    if (ask := filled(measure, "coverage")) and ask.neighbours >= ask.samples:
        told = f"{ask.neighbours} neighbours of {ask.samples} samples"
        raise StudyError(f"{where('coverage')}: {told}")
    if (ask := measure.trajectories) and (
        len(set(ask.teachers)) < len(ask.teachers) or len(ask.teachers) > 2
    ):
        raise StudyError(
            f"{where('trajectories')}: teachers {list(ask.teachers)}: two different ones at most, "
            "whose distance is the floor"
        )
    if (ask := measure.gradient_slopes) and len(set(ask.N)) < len(ask.N):
        raise StudyError(f"{where('gradient_slopes')}: N {list(ask.N)} names one twice")
    check_counts(measure, images_in(data), kind, where)


def check_primary(primary: Primary, recipe: Recipe, where: Where) -> None:
    """The primary comparison is of something that is measured."""
    wanted = {
        "metric": primary.metric,
        "nfe": primary.nfe,
        "at": primary.at,
        "ema": primary.ema,
        "reference": primary.reference,
    }
    offered = [
        {"metric": s.record["kind"], "at": s.at}
        | {k: s.record.get(k, wanted[k]) for k in ("nfe", "ema", "reference")}
        for s in settings_of(recipe.measure, recipe.factors, "student")
    ]
    if wanted in offered:
        return
    for key, value in wanted.items():
        values = {o[key] for o in offered}
        if value not in values:
            hint = nearest(value, values) if values else (
                "nothing that compares variants is; measure it, or say primary: null")
            raise StudyError(f"{where(key)}: {value!r} is not measured; {hint}")
    raise StudyError(f"{where('metric')}: {wanted} is not measured together")
