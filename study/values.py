"""What values in a study file are made of: numbers in bounds, names, and frozen structs that are
told apart by their `kind`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Noise = Annotated[float, Meta(ge=1e-6, le=1e6)]
Width = Annotated[int, Meta(ge=1, le=65_536)]
Steps = Annotated[int, Meta(ge=1, le=1_000_000)]
Share = Annotated[float, Meta(gt=0, le=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z",
                           description="a name of 1 to 64 letters, digits, _, . and -, a letter "
                                       "or digit first,")]  # fmt: skip


class Value(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plain factor value."""


class Kind(Value, frozen=True, kw_only=True, tag_field="kind"):
    """One of several values of a factor, told apart by `kind`."""
