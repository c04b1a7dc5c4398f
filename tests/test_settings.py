"""Which weights are measured: those that a study asks for, and of a source those others read."""

from __future__ import annotations

import pytest

from study.factors import Budget, Consistency, Continuous, Denoising, Factors
from study.metrics import (
    Fid,
    GradientNoise,
    Kid,
    MapError,
    Measure,
    SlicedWasserstein,
    Trajectories,
)
from study.settings import settings_of
from study.subjects import Digits, FashionMnist, Mixture, Mlp, Unet

IMAGES = Measure(
    fid=Fid(extractor="digits-cnn", samples=100, ema=(0.1, 0.05)), kid=Kid(at=(1.0,))
)
VECTORS = Measure(
    sliced_wasserstein=SlicedWasserstein(ema=(0.1, 0.05)), map_error=MapError(ema=(0.1, 0.05))
)


def lengths(measure: Measure, role: str, **changes: object) -> dict[str, set[float]]:
    """The averages measured, by kind of measurement."""
    data = FashionMnist() if measure.fid else Mixture(means=((0.0,),), std=1.0)
    plain = {"network": Mlp(), "budget": Budget(images=1), "weights_ema": (0.05, 0.02, 0.1)}
    found: dict[str, set[float]] = {}
    for asked in settings_of(measure, Factors(data=data, **plain | changes), role):
        found.setdefault(asked.record["kind"], set()).add(asked.record["ema"])
    return found


@pytest.mark.parametrize("objective", [Denoising(), Consistency()])
def test_sources_are_measured_at_the_weights_that_others_read(
    objective: Denoising | Consistency,
) -> None:
    found = lengths(IMAGES, "teacher", objective=objective)
    assert found == {"fid": {0.05}, "kid": {0.05}}
    # first of the source's own weights_ema, also where nothing asks for it
    found = lengths(IMAGES, "teacher", objective=objective, weights_ema=(0.02, 0.05, 0.1))
    assert found == {"fid": {0.02}, "kid": {0.02}}
    found = lengths(VECTORS, "teacher", objective=objective)
    assert found.pop("sliced_wasserstein") == {0.05}
    assert found == ({} if isinstance(objective, Denoising) else {"map_error": {0.05}})


def test_variants_are_measured_at_every_length_asked_for() -> None:
    assert lengths(IMAGES, "student") == {"fid": {0.05, 0.1}, "kid": {0.05, 0.1}}
    both = {"sliced_wasserstein": {0.05, 0.1}, "map_error": {0.05, 0.1}}
    assert lengths(VECTORS, "student") == both
    unasked = Measure(sliced_wasserstein=SlicedWasserstein())
    assert lengths(unasked, "student") == {"sliced_wasserstein": {0.05}}


def test_a_source_is_measured_once_at_its_end() -> None:
    factors = Factors(
        data=FashionMnist(), network=Mlp(), budget=Budget(images=1), objective=Denoising()
    )
    asked = list(settings_of(IMAGES, factors, "teacher"))
    kinds = sorted((s.at, s.record["kind"], s.record["reference"]) for s in asked)
    assert kinds == [(1.0, kind, of) for kind in ("fid", "kid") for of in ("held_out", "train")]


def test_a_continuous_source_is_measured_by_its_samples() -> None:
    factors = Factors(
        data=Digits(), network=Unet(), budget=Budget(images=128), objective=Continuous()
    )
    ask = Fid(extractor="digits-cnn", samples=64)
    measure = Measure(fid=ask, gradient_noise=GradientNoise(), trajectories=Trajectories())
    kinds = {s.record["kind"] for s in settings_of(measure, factors, "teacher")}
    assert kinds == {"fid"}
    kinds = {s.record["kind"] for s in settings_of(measure, factors, "student")}
    assert kinds == {"fid", "gradient_noise", "trajectories"}
