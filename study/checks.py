"""Combinations that mean nothing, refused before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from study.budget import snapshot_images
from study.errors import StudyError, nearest
from study.factors import (
    Analytic,
    Consistency,
    Data,
    Denoising,
    Empirical,
    Factors,
    FittedMixture,
    Mixture,
    Progressive,
    Unet,
    ignored,
    references,
)
from study.settings import Measure, extractor_identity, settings_of, snapshot_points
from study.spec import Primary, Recipe

HELD_OUT = {"digits": 400, "fashion_mnist": 10_000}  # the smaller part of each image data set
NEEDS = {
    "fid": "images",
    "kid": "images",
    "sliced_wasserstein": "a mixture of vectors",
    "mode_mass": "a mixture of vectors",
    "map_error": "a mixture or fitted_mixture, whose exact map is known",
}

Where = Callable[[str], str]  # file and key path, as written, of a key


def check_recipe(
    recipe: Recipe, where: str, sources: Mapping[str, Recipe], variants: Mapping[str, object]
) -> None:
    """What holds for one recipe among the sources of its cell; where: its place in the file."""
    factors, data = recipe.factors, recipe.factors.data
    kind = data.__struct_config__.tag
    score = None if "score" in ignored(factors) else factors.score
    if isinstance(data, Mixture):
        check_mixture(data, where)
        if isinstance(factors.network, Unet):
            raise StudyError(f"{where}.network: a unet needs images; use mlp on a {kind}")
    elif isinstance(score, Analytic) and not isinstance(data, FittedMixture):
        raise StudyError(
            f"{where}.score: analytic needs a known density (mixture, fitted_mixture), not {kind}"
        )
    steps = factors.discretization
    read = "discretization" not in ignored(factors)
    if read and isinstance(steps, Progressive) and steps.s0 > steps.s1 + 1:
        raise StudyError(
            f"{where}.discretization: s0 {steps.s0} is above s1 + 1 = {steps.s1 + 1}: N would fall"
        )
    if isinstance(score, Empirical) and getattr(data, "samples", 1) is None:
        raise StudyError(
            f"{where}.score: empirical needs finite data; give the mixture `samples` or use the "
            "analytic score"
        )
    if isinstance(factors.objective, Denoising) and recipe.role == "student":
        raise StudyError(
            f"{where}.objective: denoising is for sources; variants are consistency models, "
            "compared at one and two steps"
        )
    for factor, name in references(factors).items():
        check_reference(factors, f"{where}.{factor}.run", factor, name, sources, variants)
    asked = list(settings_of(recipe.measure, factors, recipe.role))
    points = snapshot_points(recipe.measure, asked, recipe.role)
    images = factors.budget.images
    snapshots = snapshot_images(images, factors.batch, points)
    if len(snapshots) < len(points) or len({f"{at:.3f}" for at in points}) < len(points):
        raise StudyError(
            f"{where}: measure.at: {sorted(points)} name the same update, or agree to three "
            f"decimals; {images} images are {images // factors.batch} updates"
        )
    for settings in asked:
        if settings.record["ema"] not in factors.weights_ema:
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
    wanted = {"score": Denoising, "target": Consistency}.get(factor)
    if wanted and not isinstance(source.objective, wanted):
        raise StudyError(
            f"{where}: {name!r} is trained by {source.objective.__struct_config__.tag}; "
            f"{wanted.__struct_config__.tag} expected"
        )
    if source.data != factors.data:
        raise StudyError(f"{where}: {name!r} is trained on other data")
    if (source.sigma.min, source.sigma.max) != (factors.sigma.min, factors.sigma.max):
        raise StudyError(f"{where}: {name!r} is trained on other noise levels (sigma)")
    if factor == "init" and source.network != factors.network:
        raise StudyError(f"{where}: {name!r} has another network; weights can't be copied")


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
    offered = {"sliced_wasserstein", "mode_mass"} if isinstance(data, Mixture) else {"fid", "kid"}
    if isinstance(data, Mixture | FittedMixture):
        offered.add("map_error")
    for metric, needs in NEEDS.items():
        if getattr(measure, metric) and metric not in offered:
            raise StudyError(f"{where(metric)}: {metric} needs {needs}; the data are {kind}")
    for metric in ("fid", "kid", "sliced_wasserstein", "mode_mass"):
        mid = getattr(getattr(measure, metric), "mid", None)
        if mid is not None and not factors.sigma.min < mid < factors.sigma.max:
            raise StudyError(f"{where(f'{metric}.mid')}: {mid} is not between sigma's min and max")
    if measure.kid and not measure.fid and None in (measure.kid.extractor, measure.kid.samples):
        raise StudyError(f"{where('kid')}: needs extractor and samples, or a fid")
    real = data.of.__struct_config__.tag if isinstance(data, FittedMixture) else kind
    for metric in ("fid", "kid"):
        ask = getattr(measure, metric)
        if ask and ask.extractor and not ask.extractor.startswith(f"{real}-"):
            raise StudyError(f"{where(metric)}: {ask.extractor} is not an extractor for {real}")
        if ask and ask.extractor:
            extractor_identity(ask.extractor, where(f"{metric}.extractor"))
        if ask and ask.samples and ask.samples > references_of(data):
            raise StudyError(
                f"{where(metric)}: {ask.samples} samples; FID and KID compare equal numbers, and "
                f"{kind} has {references_of(data)} images to compare with"
            )


def references_of(data: Data) -> int:
    """How many images of one part, training or held out, there are to compare with at least."""
    if isinstance(data, FittedMixture):
        return min(data.held_out, data.samples or data.held_out)
    return HELD_OUT[data.__struct_config__.tag]


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
            raise StudyError(f"{where(key)}: {value!r} is not measured; {nearest(value, values)}")
    raise StudyError(f"{where('metric')}: {wanted} is not measured together")
