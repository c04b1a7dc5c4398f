"""The files that study/ writes and the analysis reads, as types that each one is checked against.

Keys that the analysis does not look into are free.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict

from msgspec import Meta

# Names make names of files, here and in the report.
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,254}\Z")]
SCHEMA = 1
SPEND = ("images", "updates", "passes", "flops", "seconds")
SCALARS = {  # metrics and the keys they stand under; of any other kind its value, by its name
    "mode_mass": {"mode_mass_between": "between", "mode_mass_tv": "tv"}, "score_error": {},
    "gradient_noise": {"gradient_rho": "value"},
    "gradient_cosine": {"gradient_cosine": "value"},
    "gradient_slopes": {"slope_loss": "slope_loss", "slope_gradient": "slope_gradient"},
    "gradient_rounding": {"gradient_rounding": "value"},
    "trajectories": {"trajectory_error": "value"},
    "coverage": {"precision": "precision", "recall": "recall", "class_tv": "tv"},
    "pushforward": {"pushforward_w2": "w2", "pushforward_between": "between"}}
WITH_FLOOR = ("fid", "kid")  # against held-out images, where there are enough
REPORTED = ("gradient_rho", "gradient_cosine", "slope_loss", "slope_gradient",
            "gradient_rounding")  # never compared
AXES = {"gradient_noise": "sigma", "gradient_cosine": "sigma", "gradient_slopes": "N",
        "gradient_rounding": "sigma", "trajectories": "sigma", "memorisation": "",
        "coverage": "class", "pushforward": "mode"}
BESIDE = ("id", "at", "images", "seconds", "settings")  # keys of every file, none a measured value
PER_SIGMA = ("variance", "variance_se", "bias2", "bias2_se", "distance2", "distance2_se",
             "held_out_loss", "held_out_loss_se", "posterior_variance", "effective_samples")


class Budget(TypedDict):
    """A recipe's own images."""

    images: Annotated[int, Meta(ge=0, le=10**15)]


class Factors(TypedDict, total=False):
    """The factors that the analysis looks into."""

    budget: Required[Budget]
    objective: dict[str, Any]
    score: dict[str, Any]
    init: dict[str, Any]
    target: dict[str, Any]


class Recipe(TypedDict):
    """One variant or source of a cell, in study.json."""

    name: Name
    role: Literal["variant", "source"]
    cell: Name
    factors: Factors
    charge: list[str]
    ignored: list[str]


class Entry(TypedDict):
    """One run in study.json; recipe: its place in the list of recipes."""

    recipe: int
    seed: int
    id: Name
    folder: Name
    refs: list[str]
    charged: list[str]
    measures: list[str]


class Primary(TypedDict):
    """The primary comparison of a cell, in study.json."""

    variant: str
    against: str
    metric: str
    nfe: float | None
    at: float
    ema: float | None
    reference: str | None
    margin: float


class Plan(TypedDict):
    """study.json."""

    name: str
    question: str
    primary: dict[str, Primary | None] | None
    compare: NotRequired[list[tuple[str, str]]]
    seeds: list[int]
    cells: list[Name]
    recipes: list[Recipe]
    runs: list[Entry]


class Trained(TypedDict, total=False):
    """trained.json."""

    id: str
    outcome: str
    spend: dict[str, Any]
    snapshots: list[dict[str, Any]]
    data_digest: str | None
    init_digest: str | None
    stream_digest: str | None
    inputs: dict[str, str]
    attempt: str | None
    sha256: dict[str, str]


class Settings(TypedDict):
    """What makes two measurements alike; other keys are free."""

    kind: str


class Record(TypedDict):
    """A measurement file; its values are free."""

    id: str
    settings: Settings
    snapshot: NotRequired[str | None]
