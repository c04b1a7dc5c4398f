"""What the recipes of a cell say of each other: images, the factors that differ, fixed points.

A recipe whose objective is fixed_point is computed and not trained: where its method ends, at no
images. Its counterparts are the trained recipes that it is the end of.
"""

from __future__ import annotations

import json
import math
from typing import Any

from matplotlib.ticker import EngFormatter

from analysis.records import number

BUDGET, SPLIT = "budget", "budget split"
AMOUNT = EngFormatter(sep="")  # 64k
DECIDE = ("data", "score", "solver", "discretization", "distance", "sigma")  # where a method ends


def kind_of(factors: dict[str, Any], name: str) -> str:
    """The kind of a factor; "" of one that is null or not there."""
    return (factors.get(name) or {}).get("kind", "")


def computed(recipe: dict[str, Any]) -> bool:
    """Whether a recipe is a fixed point."""
    return kind_of(recipe["factors"], "objective") == "fixed_point"


def endless(recipe: dict[str, Any]) -> bool:
    """Whether every image is a fresh draw of a known population."""
    data = recipe["factors"].get("data") or {}
    return data.get("kind") in ("mixture", "fitted_mixture") and data.get("samples") is None


def planned(recipes: dict[str, Any], name: str) -> tuple[float, float]:
    """A recipe's own images and those of the sources charged to it."""
    def images(n: str) -> float:
        given = recipes[n]["factors"].get(BUDGET, {}).get("images")
        return 0.0 if computed(recipes[n]) else number(given)

    return images(name), math.fsum(images(n) for n in recipes[name]["charge"])


def differing(recipes: dict[str, Any], a: str, b: str) -> tuple[str, ...]:
    """The top-level factors in which two recipes differ; those left out that both ignore, or that
    one does which is computed."""
    one, two = recipes[a]["factors"], recipes[b]["factors"]
    idle = {BUDGET, *({*recipes[a]["ignored"]} & {*recipes[b]["ignored"]})}
    fixed = [n for n in (a, b) if computed(recipes[n])]
    idle |= {k for n in fixed for k in recipes[n]["ignored"]}
    keys = [k for k in dict.fromkeys([*one, *two]) if k not in idle and one.get(k) != two.get(k)]
    if fixed:
        return tuple(keys)
    (own_a, charged_a), (own_b, charged_b) = bills = [planned(recipes, n) for n in (a, b)]
    if own_a + charged_a != own_b + charged_b:
        keys.append(BUDGET)
    elif own_a != own_b:
        own, charged = max(bills, key=lambda bill: bill[1])
        keys.append(f"{SPLIT} ({AMOUNT(own)} own + {AMOUNT(charged)} charged)")
    return tuple(keys)


def along(recipes: dict[str, Any], sides: tuple[str, str], factor: str, name: str) -> float:
    """Where a recipe's value of the primary's factor lies between the baseline's, 0, and the
    variant's, 1: amounts in proportion, any other value halfway.
    """
    def value(n: str) -> object:
        return sum(planned(recipes, n)) if factor == BUDGET else recipes[n]["factors"].get(factor)

    x, high, low = value(name), value(sides[0]), value(sides[1])
    if all(number(v) == v for v in (x, high, low)):
        return (x - low) / (high - low)
    return 0.0 if x == low else 1.0 if x == high else 0.5


def counterparts(recipes: dict[str, Any]) -> dict[str, str]:
    """The fixed point of each trained variant that has one in the cell: {variant: fixed point}."""
    own = {n: r for n, r in recipes.items() if r["role"] == "variant"}
    ends = {end(r["factors"]): n for n, r in reversed(own.items()) if computed(r)}
    trained = [n for n, r in own.items() if not computed(r)
               and kind_of(r["factors"], "objective") == "consistency"
               and kind_of(r["factors"], "target") != "frozen"]
    return {n: ends[end(own[n]["factors"])] for n in trained if end(own[n]["factors"]) in ends}


def end(factors: dict[str, Any], without: str = "") -> str:
    """The factors that decide where a method ends, but for one of them, as text. With a score that
    has no noise every distance ends at the same."""
    exact = kind_of(factors, "score") == "analytic"
    keys = [k for k in DECIDE if k != without and not (exact and k == "distance")]
    return json.dumps({k: factors.get(k) for k in keys}, sort_keys=True)
