"""Layers of a study file: YAML in, typed factor values out, every value's origin remembered.

A run's factors are merged from layers, later over earlier: defaults < base < cell < from < own
keys. A mapping merges into the one below it unless it names another `kind`, which replaces it.
Shorthands:
a bare string is {kind: string}; {run: X} is {kind: run, run: X} where the factor knows that kind;
a dotted key is a path. Every error names the file, the key path as written there, what was given,
and what is allowed.
"""

from __future__ import annotations

import io
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    Event,
    ScalarEvent,
)

from study.bounded import content
from study.errors import StudyError, nearest

MAX_BYTES = 1 << 18  # a study file is written by hand
MOST_VALUES = 100_000  # aliases counted for all that they stand for
MOST_DEEP = 32
MOST_WHOLE = 2**63


def read_yaml(text: str, file: str) -> Any:  # noqa: ANN401 - YAML holds anything
    """Parses YAML 1.2 safely. Raises StudyError for syntax, duplicate keys and unusable
    scalars."""
    if len(text) > MAX_BYTES:
        raise StudyError(f"{file}: {len(text)} letters; a study file has at most {MAX_BYTES}")
    try:
        _check_events(YAML(typ="safe", pure=True).parse(io.StringIO(text)), file)
        value = YAML(typ="safe", pure=True).load(io.StringIO(text))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise StudyError(f"{file}{line}: {problem}") from None
    except (ValueError, RecursionError, OverflowError) as error:  # odd dates, deep nesting
        raise StudyError(f"{file}: not readable as YAML: {error}") from None
    _check_scalars(value, file, ())
    return value


def _check_events(events: Iterable[Event], file: str) -> None:
    """Refuses, before anything is made of them, tags, a value inside itself, and values that are
    nested deeply or, once aliases stand for what they mean, too many."""
    sizes: dict[str, int] = {}  # values below each anchor
    above: list[tuple[str | None, int]] = []  # anchor of each open value, and how many were before
    count = 0
    for event in events:
        where = f"{file}, line {event.start_mark.line + 1}"
        if getattr(event, "tag", None) is not None:
            raise StudyError(f"{where}: the tag {event.tag}; allowed: none")
        if isinstance(event, AliasEvent):
            if event.anchor in (anchor for anchor, _ in above):
                raise StudyError(f"{where}: {event.anchor!r} nested in itself")
            count += sizes.get(event.anchor, 0)
        elif isinstance(event, CollectionStartEvent | ScalarEvent):
            above.append((event.anchor, count))
            count += 1
        if isinstance(event, CollectionEndEvent | ScalarEvent):
            anchor, before = above.pop()
            sizes[anchor] = count - before
        if len(above) > MOST_DEEP:
            raise StudyError(f"{where}: nested too deeply; allowed: {MOST_DEEP} levels")
        if count > MOST_VALUES:
            raise StudyError(f"{where}: over {MOST_VALUES} values, counting aliases for all that "
                             "they stand for")  # fmt: skip


def _check_scalars(value: object, file: str, path: tuple[str, ...]) -> None:
    """Refuses numbers that are not finite or beyond 64 bits, and keys that are not text."""
    where = f"{file}: {'.'.join(path)}" if path else file
    if isinstance(value, float) and not math.isfinite(value):
        raise StudyError(f"{where}: {value} is not a finite number")
    if isinstance(value, int) and abs(value) >= MOST_WHOLE:
        raise StudyError(f"{where}: a whole number of over 64 bits")
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            if isinstance(value, Mapping) and not isinstance(key, str):
                raise StudyError(f"{where}: the key {key!r} is not text; quote it")
            _check_scalars(item, file, (*path, str(key)))


def read_file(path: Path) -> dict:
    """Reads a YAML file whose root is a mapping."""
    data = content(path, MAX_BYTES)
    if data is None:
        near = [p for p in Path("sweeps").glob("*.yaml") if p.stem == path.stem]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise StudyError(f"{path}: cannot be read: no such file{hint}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: cannot be read: {error}") from None
    return mapping(read_yaml(text, str(path)), str(path))


def mapping(value: object, where: str) -> dict:
    """The value as a dict with dotted keys expanded; null is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise StudyError(f"{where}: {value!r:.200} given, a mapping of keys expected")
    result: dict = {}
    for key, item in value.items():
        put(result, key.split("."), item, f"{where}: {key}")
    return result


def put(tree: dict, path: list[str], value: object, where: str) -> None:
    """Sets tree[path[0]][path[1]]... = value; mappings merge. Raises StudyError on a double
    key."""
    *parents, last = path
    if not all(path):
        raise StudyError(f"{where}: an empty name in a dotted key")
    for name in parents:
        below = tree.setdefault(name, {})
        if isinstance(below, str):  # `score.run` beside `score: teacher`
            below = {"kind": below}
        elif not isinstance(below, dict):
            raise StudyError(f"{where}: {name} is already given as {below!r}")
        tree[name] = tree = dict(below)
    old = tree.get(last)
    if isinstance(old, dict) and isinstance(value, str):
        value = {"kind": value}
    if isinstance(old, dict) and isinstance(value, Mapping):
        if clash := set(old) & set(value):
            raise StudyError(f"{where}: {sorted(clash)[0]} is given twice")
        value = {**old, **value}
    elif last in tree:
        raise StudyError(f"{where}: given twice")
    tree[last] = value


def overlay(tree: dict, path: list[str], value: object, where: str) -> None:
    """Replaces tree[path[0]][path[1]]... by value, making the mappings on the way."""
    for name in path[:-1]:
        below = tree.get(name)
        below = {"kind": below} if isinstance(below, str) else below
        tree[name] = below = mapping(below, f"{where}: {name}")
        tree = below
    if not all(path):
        raise StudyError(f"{where}: an empty name in the key path")
    tree[path[-1]] = value


def overlap(a: str, b: str) -> bool:
    """Whether one key path is the other or stands above it."""
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


class Layered:
    """Values of one struct type merged from layers, with the key path that each came from."""

    def __init__(self, struct: type[msgspec.Struct], file: str) -> None:
        self.struct, self.file = struct, file
        self.types = typing.get_type_hints(struct, include_extras=True)
        self.defaults = {f.name: f.default for f in msgspec.structs.fields(struct)}
        self.values: dict[str, Any] = {}
        self.origin: dict[
            str, str
        ] = {}  # 'optimizer' or 'optimizer.lr' -> 'variants.ct.optimizer'

    def add(self, layer: Mapping[str, Any], where: str) -> list[str]:
        """Lays `layer` over what is there; returns the key paths that it sets."""
        paths = []
        for key, given in layer.items():
            origin = f"{where}.{key}"
            if key not in self.types:
                raise StudyError(f"{self.file}: {origin}: no such key; {nearest(key, self.types)}")
            value = self._expand(key, given)
            old = self.values.get(key)
            merges = (
                isinstance(value, dict)
                and isinstance(old, dict)
                and value.get("kind") in (None, old.get("kind", self._default_kind(key)))
            )
            self.values[key] = {**old, **value} if merges else value
            if not merges:
                self.origin = {p: o for p, o in self.origin.items() if p.split(".")[0] != key}
            fields = [f"{key}.{name}" for name in value] if merges else [key]
            self.origin |= {path: f"{where}.{path}" for path in fields}
            paths += fields
        return paths

    def _default_kind(self, key: str) -> str | None:
        config = getattr(self.defaults[key], "__struct_config__", None)
        return config.tag if config else None

    def _expand(self, key: str, given: Any) -> Any:  # noqa: ANN401
        """The shorthands, for a factor that has kinds; dotted keys in any mapping."""
        kinds = tags(self.types[key])
        if kinds and isinstance(given, str):
            return {"kind": given}
        if isinstance(given, Mapping):
            given = mapping(given, f"{self.file}: {key}")
            if kinds and "kind" not in given:
                given = next(({"kind": k, **given} for k in kinds if k in given), given)
        return given

    def where(self, path: str) -> str:
        """File and key path as written, of the value at `path`."""
        key = re.split(r"[.\[]", path)[0]
        known = path if path in self.origin else key
        return f"{self.file}: {self.origin.get(known, known)}{path[len(known) :]}"

    def build(self) -> Any:  # noqa: ANN401
        """The struct. Raises StudyError for a missing, misspelt or ill-typed value."""
        done = {}
        for field in msgspec.structs.fields(self.struct):
            if field.name in self.values:
                done[field.name] = self._convert(field.name, self.values[field.name])
            elif field.required:
                raise StudyError(f"{self.file}: {field.name}: missing, and it has no default")
        return self.struct(**done)

    def _convert(self, key: str, value: Any) -> Any:  # noqa: ANN401
        kinds = tags(self.types[key])
        if kinds:
            if not isinstance(value, dict):
                raise StudyError(
                    f"{self.where(key)}: {value!r:.200} given; a kind or a mapping expected "
                    f"({nearest('', kinds)})"
                )
            default = self._default_kind(key)
            value = {"kind": default, **value} if default else value
            value = chosen(value, kinds, self.where(key))
            return convert(value, kinds[value["kind"]], lambda sub: self.where(f"{key}{sub}"))
        kind = self.types[key]  # whole: what an Annotated holds beside its type are the bounds
        structs = [k for k in typing.get_args(kind) if is_struct(k)]
        kind = structs[0] if len(structs) == 1 and value is not None else kind  # struct or null
        return convert(value, kind, lambda sub: self.where(f"{key}{sub}"))


def chosen(value: object, kinds: Mapping[str, type], where: str) -> object:
    """A factor's value as a mapping that names one of its kinds. Raises StudyError for others."""
    value = {"kind": value} if isinstance(value, str) else value
    if isinstance(value, Mapping) and "kind" not in value:
        value = next(({"kind": k, **value} for k in kinds if k in value), value)
    kind = value.get("kind") if isinstance(value, dict) else value
    if not isinstance(kind, str) or kind not in kinds:
        raise StudyError(f"{where}: kind {kind!r}; {nearest(kind, kinds)}")
    return value


def convert(value: Any, kind: Any, where: typing.Callable[[str], str]) -> Any:  # noqa: ANN401
    """msgspec's conversion with errors in a user's words; `where` gives the key path of a part."""
    if is_struct(kind) and isinstance(value, dict):
        fields = {f.name: f for f in msgspec.structs.fields(kind)}
        for name in value:
            if name not in fields and name != kind.__struct_config__.tag_field:
                raise StudyError(f"{where('.' + name)}: no such key; {nearest(name, fields)}")
        for name, field in fields.items():
            if field.required and name not in value:
                raise StudyError(f"{where('')}: needs {name!r}")
            if name in value and (kinds := tags(field.type)):  # a value in a value
                value = {**value, name: chosen(value[name], kinds, where(f".{name}"))}
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        part, given = path.rstrip("`"), value
        for step in re.findall(r"\.(\w+)|\[(\d+)\]", part):
            given = given[step[0]] if step[0] else given[int(step[1])]
        at = _type_at(kind, value, part)
        if typing.get_origin(bare := _bare(at)) is typing.Literal:
            reason = nearest(given, typing.get_args(bare))
        elif "matching regex" in reason:  # whose type says it in words
            reason = f"{at.__metadata__[0].description} expected"
        elif reason.startswith("Expected `array`") and isinstance(given, str | int | float):
            reason = f"a list expected: [{given}]"
        raise StudyError(
            f"{where(part)}: {given!r:.200} given; {reason[0].lower()}{reason[1:]}"
        ) from None


def _member(kind: Any) -> Any:  # noqa: ANN401
    """X of a type `X | None`, else the type."""
    members = [m for m in typing.get_args(kind) if m is not type(None)]
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType) and len(members) == 1
    return members[0] if optional else kind


def _bare(kind: Any) -> Any:  # noqa: ANN401
    """The type without bounds and null."""
    kind = _member(kind)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def _type_at(kind: Any, value: Any, part: str) -> Any:  # noqa: ANN401
    """The type, with its bounds, of a part of a value of this type; None where not known."""
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", part):
        kind = _bare(kind)
        if kinds := tags(kind):
            kind = kinds.get(str(value.get("kind")), kind)
        value = value[name] if name else value[int(index)]
        if not name:
            kind = next(iter(typing.get_args(kind)), None)
        elif is_struct(kind):
            kind = typing.get_type_hints(kind, include_extras=True).get(name)
    return _member(kind)


def tags(kind: Any) -> dict[str, type]:  # noqa: ANN401
    """kind -> struct, for a factor told apart by its kind; empty for any other type."""
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    structs = [m for m in members if is_struct(m)]
    return {m.__struct_config__.tag: m for m in structs if m.__struct_config__.tag}


def is_struct(kind: Any) -> bool:  # noqa: ANN401
    """Whether a type is a struct, and nothing around one."""
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
