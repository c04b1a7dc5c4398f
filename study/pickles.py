"""Pickles from outside, read as data.

A pickle is a program for a small machine, and the one way out of that machine is a name, looked up
as module.name and then called. Here every name is looked up in a table that the caller gives, and
in nothing else: no module is imported, no class found, no code executed that is not in the table.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from study.errors import StudyError

LARGEST = 1 << 30  # bytes
MOST_TUPLES = 50_000  # one in another that deep overflows the C stack when it is hashed
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


def restricted(
    data: bytes,
    allowed: Mapping[tuple[str, str], Callable[..., Any]],
    where: str,
    largest: int = LARGEST,
) -> Any:  # noqa: ANN401 - a pickle holds anything
    """The value of a pickle of protocol 0 to 5, in which each (module, name) of `allowed` stands
    for what it is mapped to and text of Python 2 is bytes.

    A pickle can call what it is given, on any arguments, and set the state of what it is given by
    __setstate__ or else attribute by attribute: so give functions and classes of your own, made
    for this one reading, that check what they get; functions are wrapped here and have no
    attributes. Raises StudyError, beginning with `where`: for more than `largest` bytes, for any
    other name, said as module.name, for a persistent id, and for what is torn or no pickle.
    """
    if len(data) > largest:
        raise StudyError(f"{where}: found a pickle of {len(data)} bytes; allowed: {largest}")
    try:
        _scan(data, where)
        return _Reader(data, allowed, where).load()
    except StudyError:
        raise
    except Exception as error:  # a torn or forged pickle leads the machine to raise anything
        raise StudyError(f"{where}: cannot be read as a pickle: {error!r}") from error


def _scan(data: bytes, where: str) -> None:
    """Refuses what would have the machine take memory or stack out of proportion to the pickle: a
    place of its memory far beyond the pickle's end, bytes that are not there, endless nesting."""
    tuples = 0
    for opcode, argument, at in pickletools.genops(data):
        tuples += opcode.name.startswith("TUPLE")
        if tuples > MOST_TUPLES:
            raise StudyError(f"{where}: the pickle has more than {MOST_TUPLES} tuples")
        if opcode.name in PUTS and argument > at:
            raise StudyError(f"{where}: {opcode.name} {argument} at byte {at} of the pickle: it "
                             "asks for more memory than it can fill")  # fmt: skip


class _Reader(pickle.Unpickler):
    """The machine, its only way out closed."""

    def __init__(self, data: bytes, allowed: Mapping, where: str) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.allowed, self.where = allowed, where

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """The caller's stand-in for module.name."""
        if (module, name) not in self.allowed:
            known = ", ".join(".".join(key) for key in self.allowed) or "none"
            raise StudyError(
                f"{self.where}: the pickle asks for {module}.{name}; allowed: {known}"
            )
        found = self.allowed[module, name]
        return found if isinstance(found, type) else _Function(found)

    def persistent_load(self, pid: object) -> None:
        """Refuses a reference to something outside the pickle."""
        raise StudyError(f"{self.where}: the pickle refers to something outside it, {pid!r:.80}")


class _Function:
    """A function that can be called and not changed."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: object) -> Any:  # noqa: ANN401
        """What it returns."""
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function has no state to set")
