"""One measurement file as rows of the frames: scalars, values by noise level, instruments.

A metric is a scalar that runs can be compared by. An instrument's values, by noise level, by N, by
class or by mode, go into one long frame, one row each.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

from analysis.files import AXES, BESIDE, PER_SIGMA, SCALARS

COLUMNS = {
    "measures": ("name", "role", "cell", "seed", "id", "at", "images", "images_total",
                 "images_with_sources", "metric", "nfe", "ema", "reference", "value", "floor",
                 "draws", "draws_sd", "identity", "file"),
    "score_errors": ("name", "cell", "seed", "id", "at", "score", "sigma", *PER_SIGMA, "known",
                     "dimension", "t_star", "identity", "file"),
    "map_errors": ("name", "cell", "seed", "id", "at", "ema", "sigma", "rms", "identity", "file"),
    "instruments": ("kind", "name", "role", "cell", "seed", "id", "at", "nfe", "ema", "over",
                    "level", "quantity", "value", "se", "identity", "file")}
LARGEST = 1e100  # a square of it is still a number


def number(value: object) -> float:
    """A JSON number as float; nan for null, text and what no measurement gives: "not measured"."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= LARGEST else math.nan


def numbers(values: object) -> list[float]:
    """A JSON list as floats (see `number`); empty for anything else."""
    return [number(v) for v in values] if isinstance(values, list) else []


def renamed(value: Any, names: Mapping[str, str]) -> Any:  # noqa: ANN401 (a JSON value)
    """Settings or factors with the ids of runs replaced by their names, wherever they stand."""
    if isinstance(value, dict):
        return {k: names.get(v, v) if k == "run" and isinstance(v, str)
                else [names.get(n, n) for n in v] if k == "teachers" and isinstance(v, list)
                else renamed(v, names) for k, v in value.items()}
    return value


def identity(settings: dict[str, Any], data_digest: str | None) -> str:
    """A measurement's identity: kind and every setting but the point, with the data's digest.

    Only values of equal identity may be compared or averaged.
    """
    known = sorted(settings.items(), key=lambda item: (isinstance(item[1], dict | list), item[0]))
    parts = [f"{k}={v if isinstance(v, str) else json.dumps(v, sort_keys=True)}"
             for k, v in known if k not in ("kind", "at") and v is not None]
    return f"{settings['kind']}[{', '.join([*parts, f'data_digest={data_digest}'])}]"


def spread(rows: dict[str, list[tuple]], where: tuple, role: str, extra: tuple[float, float],
           digest: str | None, file: str, record: dict[str, Any], names: Mapping[str, str]
           ) -> None:
    """Appends one measurement file's values to the rows of the frames.

    extra: the images charged to the run, and those of all its sources. names: of runs by id, so
    that the same source is one over the seeds.
    """
    settings = renamed(record["settings"], names)
    if isinstance(record.get("along"), str):  # whose path a distance is measured along
        settings = settings | {"along": record["along"]}
    kind, at, images = settings["kind"], number(record.get("at")), number(record.get("images"))
    what = identity(settings, digest)
    name, cell, seed, run = where
    draws = numbers(record.get("draws"))
    told = len(draws) > 1 and not any(map(math.isnan, draws))
    sd = statistics.stdev(draws) if told else math.nan
    nfe, ema = number(settings.get("nfe")), settings.get("ema")
    ema = "" if ema is None else str(ema)
    for metric, key in SCALARS.get(kind, {kind: "value"}).items():
        if metric == "class_tv" and key not in record:  # the extractor knows no classes
            continue
        rows["measures"].append((
            name, role, cell, seed, run, at, images, *(images + x for x in extra), metric,
            nfe, ema, str(settings.get("reference") or ""),
            number(record.get(key)), number(record.get("floor")), len(draws), sd, what, file))
    sigmas = numbers(record.get("sigma"))
    if kind == "score_error":
        columns = [numbers(record.get(k)) or [math.nan] * len(sigmas) for k in PER_SIGMA]
        tail = (bool(record.get("known")), number(record.get("dimension")),
                number(record.get("t_star")), what, file)
        score = json.dumps(record["settings"].get("score"), sort_keys=True)
        rows["score_errors"] += [(*where, at, score, *values, *tail)
                                 for values in zip(sigmas, *columns, strict=False)]
    if kind == "map_error":
        rows["map_errors"] += [(*where, at, ema, sigma, rms, what, file) for sigma, rms
                               in zip(sigmas, numbers(record.get("rms")), strict=False)]
    if kind in AXES:
        rows["instruments"] += [(kind, name, role, cell, seed, run, at, nfe, ema, *values, what,
                                 file) for values in _long(AXES[kind], record)]


def _long(axis: str, record: dict[str, Any]) -> Iterator[tuple[str, float, str, float, float]]:
    """(over, level, quantity, value, se) of every number in an instrument's file.

    over: what the values stand over: sigma, N, class or mode, each with its level; law, the mean
    under the law of training; or run, a single number. Null in a list is nan; a null in place of a
    list or number has no row.
    """
    levels = numbers(record.get(axis))
    for key, given in record.items():
        if key in BESIDE or (key == axis and levels):
            continue
        if isinstance(given, list) and not key.endswith("_se"):
            values, errors = numbers(given), numbers(record.get(f"{key}_se"))
            at = levels or range(len(values))
            for level, value, se in zip_longest(at, values[:len(at)], errors[:len(at)],
                                                fillvalue=math.nan):
                yield axis, float(level), key, value, se
        elif key == "law" and isinstance(given, dict):
            yield from _scalars("law", given)
    yield from _scalars("run", {k: v for k, v in record.items() if k not in BESIDE})


def _scalars(over: str, given: dict[str, Any]) -> Iterable[tuple[str, float, str, float, float]]:
    """The same of the numbers of a JSON object, each with its standard error beside it."""
    return [(over, math.nan, key, number(value), number(given.get(f"{key}_se")))
            for key, value in given.items()
            if number(value) == number(value)
            and not (key.endswith("_se") and key[:-3] in given)]
