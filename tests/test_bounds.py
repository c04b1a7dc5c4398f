"""Every bound that a field of a study file declares, read from the types and tried from just
beyond it: whatever is added to the structs is tried as well."""

# ruff: noqa: ANN401 - types and values of any kind

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from studies import TWO_MODES, read

from study.errors import StudyError
from study.factors import Factors
from study.metrics import Measure
from study.spec import Primary

ROOTS = {"base": Factors, "measure": Measure, "primary": Primary}
Case = tuple[str, Any, Any, str]  # below the key, its whole value, what of it is wrong, the bound


def parts(kind: Any) -> tuple[Any, msgspec.Meta | None]:
    """A type without its bounds, and these."""
    if typing.get_origin(kind) is typing.Annotated:
        bare, *metas = typing.get_args(kind)
        (meta,) = [m for m in metas if isinstance(m, msgspec.Meta)]
        return bare, meta
    return kind, None


def union(kind: Any) -> list[Any]:
    """The members of a union; any other type is its only one."""
    several = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return list(typing.get_args(kind)) if several else [kind]


def fine(kind: Any) -> Any:
    """A value that the type allows."""
    bare, meta = parts(kind)
    if len(union(bare)) > 1:
        return fine(union(bare)[0])
    if typing.get_origin(bare) is typing.Literal:
        return typing.get_args(bare)[0]
    if typing.get_origin(bare) is tuple:
        of = typing.get_args(bare)
        if of[1:] == (...,):
            return [fine(of[0])] * max(1, (meta and meta.min_length) or 1)
        return [fine(k) for k in of]
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        return struct(bare)
    if bare is str:
        return "a.pt"
    if meta and meta.ge is not None:
        return bare(meta.ge)
    return bare(0.5 if meta is None or meta.gt is None else meta.gt + 1)


def struct(kind: type[msgspec.Struct], **given: Any) -> dict[str, Any]:
    """A struct's mapping with these fields, and those that have no default."""
    own = {f.name: fine(f.type) for f in msgspec.structs.fields(kind) if f.required}
    tag = kind.__struct_config__.tag
    return ({"kind": tag} if tag else {}) | own | given


def beyond(kind: Any) -> Iterator[Case]:
    """A value just beyond each bound of the type, and no finite number for each float."""
    bare, meta = parts(kind)
    if len(union(bare)) > 1:
        for member in union(bare):
            yield from beyond(member)
    elif typing.get_origin(bare) is tuple:
        of = typing.get_args(bare)
        for path, value, bad, bound in beyond(of[0]):
            rest = fine(kind)[1:]
            yield f"[0]{path}", [value, *rest], bad, bound
        if meta and meta.min_length:
            few = fine(kind)[: meta.min_length - 1]
            yield "", few, few, f">= {meta.min_length}"
        if meta and meta.max_length:
            many = [fine(of[0])] * (meta.max_length + 1)
            yield "", many, many, f"<= {meta.max_length}"
    elif isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        for field in msgspec.structs.fields(bare):
            for path, value, bad, bound in beyond(field.type):
                yield f".{field.name}{path}", struct(bare, **{field.name: value}), bad, bound
    elif bare in (int, float):
        step = (lambda x, s: x + s) if bare is int else (lambda x, s: math.nextafter(x, s * 9e99))
        for name, sign, words in (("ge", -1, ">="), ("le", 1, "<="), ("gt", 0, ">"),
                                  ("lt", 0, "<")):  # fmt: skip
            if meta and (bound := getattr(meta, name)) is not None:
                bad = step(bare(bound), sign) if sign else bare(bound)
                yield "", bad, bad, f"{words} {bare(bound)}"
        if meta and meta.multiple_of:
            bad = fine(kind) + 1
            yield "", bad, bad, f"multiple of {meta.multiple_of}"
        if bare is float:
            for bad in (math.nan, math.inf, -math.inf):
                yield "", bad, bad, "not a finite number"
    elif typing.get_origin(bare) is typing.Literal:
        yield "", "nonsense", "nonsense", str(typing.get_args(bare)[0])
    elif bare is str and meta and meta.pattern:
        yield "", "/", "/", f"given; {meta.description} expected"
    else:
        assert bare in (str, bool, type(None)), bare


CASES = [
    (f"{root}.{field.name}", *case)
    for root, kind in ROOTS.items()
    for field in msgspec.structs.fields(kind)
    for case in beyond(field.type)
]


def text(value: Any) -> str:
    """The value as YAML."""
    return json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")


def test_the_cases_are_all_there() -> None:
    """What the walk finds, against what declares a bound in the files."""
    tried = {(key, path) for key, path, *_ in CASES}
    for key, path in (("base.dropout", ""), ("base.batch", ""), ("base.repeat", ""),
                      ("base.data_stream", ""), ("base.weights_ema", "[0]"),
                      ("base.optimizer", ".betas[0]"), ("base.score", ".inside.alpha"),
                      ("base.budget", ".share"), ("base.data", ".std[0]"),
                      ("measure.fid", ".nfe[0]"), ("measure.gradient_cosine", ".against.k"),
                      ("measure.at", "[0]"), ("primary.margin", "")):  # fmt: skip
        assert (key, path) in tried, (key, path)
    assert len(CASES) > 400


@pytest.mark.parametrize("root", ROOTS)
def test_a_value_beyond_its_bound_is_refused_by_key_value_and_bound(
    root: str, tmp_path: Path
) -> None:
    for key, path, value, bad, bound in CASES:
        if key.split(".")[0] != root:
            continue
        with pytest.raises(StudyError) as error:
            read(tmp_path, sets=(f"{key}={text(value)}",))
        told, case = str(error.value), (key, path, text(value)[:80])
        place = f"small.yaml: {key}{path}: {bad!r:.200} given; "
        if bound == "not a finite number":  # found before it is known what the keys mean
            inner = re.sub(r"\[(\d+)\]", r".\1", path).removeprefix(".")
            place = f"--set {key}={text(value)}: " + f"{inner}: " * bool(inner) + f"{bad} is "
        assert place in told, (case, told)
        assert bound in told, (case, told)


@pytest.mark.parametrize("where", ["base", "cells.here", "sources.edm", "variants.ct"])
@pytest.mark.parametrize(("key", "value", "bound"), [
    ("dropout", "-1", ">= 0"), ("dropout", "1.0", "< 1"), ("repeat", "0", ">= 1"),
    ("repeat", "1001", "<= 1000"), ("data_stream", "-1", ">= 0"), ("batch", "0", ">= 1"),
    ("batch", "-1", ">= 1"),
])  # fmt: skip
def test_so_is_one_of_any_layer(
    where: str, key: str, value: str, bound: str, tmp_path: Path
) -> None:
    with pytest.raises(StudyError) as error:
        read(tmp_path, sets=(f"{where}.{key}={value}",))
    assert f"small.yaml: {where}.{key}: {value} given; expected" in str(error.value)
    assert bound in str(error.value)


@pytest.mark.parametrize(("key", "given", "expected"), [
    ("init.weights", "../photos", "a .pkl, .pt, .pth or .safetensors file expected"),
    ("score", "{kind: teacher, run: a/b}", "a name of 1 to 64 letters, digits, _, . and -, a "
                                           "letter or digit first, expected"),
    ("score", "{kind: blend, alpha: 0, beta: 0, run: a/b}", "a name of 1 to 64 letters"),
])  # fmt: skip
def test_a_pattern_is_told_in_words(key: str, given: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="given; ") as error:
        read(tmp_path, sets=(f"variants.ct.{key}={given}",))
    assert expected in str(error.value) and "regex" not in str(error.value)


@pytest.mark.parametrize("where", ["seeds", "variants.ct.seeds", "sources.edm.seeds"])
@pytest.mark.parametrize("seeds", ["[-1]", f"[{2**31}]", "[0.5]", "[]", "[true]"])
def test_so_is_a_seed(where: str, seeds: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=rf"small.yaml: {where}: .* given; a list of different"):
        read(tmp_path, TWO_MODES, (f"{where}={seeds}",))


@pytest.mark.parametrize("kind", ["[]", "{}", "1", "null", "nonsense"])
def test_so_is_a_kind_that_is_none_deep_inside(kind: str, tmp_path: Path) -> None:
    window = f"{{kind: windowed, inside: {{kind: {kind}}}, outside: own, t_low: 1, t_high: 2}}"
    with pytest.raises(StudyError, match=r"small.yaml: measure.gradient_cosine.against.inside"):
        read(tmp_path, sets=(f"measure.gradient_cosine.against={window}",))
