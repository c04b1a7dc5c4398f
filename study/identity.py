"""The identity of a run: what makes two trainings the same one.

id = first 10 hex digits of SHA-256 over canonical JSON of: schema number, role, seed, and the
factors' difference from their defaults, compared by value, with the tags always kept, factors that
the objective never reads left out, and every referenced run replaced by its own id. What an id
leaves out is listed in OUTSIDE; nothing else is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache, reduce
from pathlib import PurePath

import msgspec

from study.factors import Factors, FromWeights
from study.meaning import ignored

SCHEMA = 2  # raise it when a default changes or a value changes its meaning
OUTSIDE = (
    "names of studies, variants, sources and cells",
    "question",
    "primary",
    "compare",
    "measure",
    "charge",
    "data.root",
    "the folder of a file of weights, and its content (trained.json)",
    "device",
    "number of workers",
    "paths",
    "what needs data to be known: the measured sigma_data and the data's digest (trained.json)",
)


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: object, length: int) -> str:
    """First `length` hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:length]


_fields = cache(msgspec.structs.fields)  # a study of thousands of runs asks for few types


def difference(value: object) -> object:
    """A struct as plain data: its tag and the fields that differ from their defaults by value."""
    if not isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    tag = value.__struct_config__.tag
    if isinstance(value, FromWeights):
        return {"kind": tag, "weights": PurePath(value.weights).name}
    result = {"kind": tag} if tag else {}
    for field in _fields(type(value)):
        here = getattr(value, field.name)
        if field.name != "root" and (field.required or here != field.default):
            result[field.name] = difference(here)
    return result


def canonical(factors: Factors, ids: Mapping[str, str]) -> dict:
    """What of the factors enters the id. ids: referenced run's id by the factor that names it."""
    return _read(difference(factors), factors, ids)


def complete(factors: Factors, ids: Mapping[str, str]) -> dict:
    """All factors that the run reads, defaults written out, references by id: for its run.json."""
    return _read(msgspec.to_builtins(factors), factors, ids)


def _read(plain: dict, factors: Factors, ids: Mapping[str, str]) -> dict:
    """Plain factors without those the objective never reads, references by id."""
    for name in ignored(factors):
        plain.pop(name, None)
    for path, reference in ids.items():
        reduce(dict.__getitem__, path.split("."), plain)["run"] = reference
    return plain


def run_id(factors: Factors, ids: Mapping[str, str], role: str, seed: int) -> str:
    """The ten hex digits that name this run."""
    return digest({"schema": SCHEMA, "role": role, "seed": seed, **canonical(factors, ids)}, 10)
