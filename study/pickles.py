"""Pickles from outside, read as data.

A pickle is a program for a small machine, and the one way out of that machine is a name, looked up
as module.name and then called. Here every name is looked up in a table that the caller gives, and
in nothing else: no module is imported, no class found, no code executed that is not in the table.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from reprlib import repr  # of a few items and levels, whatever it is given
from typing import Any

from study.errors import StudyError

LARGEST = 1 << 30  # bytes
TORN = "exhausted|not enough data|only .* remain|no newline found"  # pickletools at the data's end
MOST_TUPLES = 50_000  # in one another: that deep they overflow the C stack when they are hashed
PUTS, GETS = (tuple(f"{kind}{way}" for kind in ("", "BIN", "LONG_BIN")) for way in ("PUT", "GET"))
TUPLES = ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")


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
        torn = isinstance(error, EOFError) or re.search(TORN, str(error))
        told = "it is truncated, or no pickle" if torn else f"{error!r}"
        raise StudyError(f"{where}: cannot be read as a pickle: {told}") from error


def _scan(data: bytes, where: str) -> None:
    """Refuses what would have the machine take memory, time or stack out of proportion to the
    pickle: a place of its memory far beyond the pickle's end, bytes that are not there, and tuples
    in tuples, shared or nested, whose hash visits more of them than any honest file holds.

    The stack is followed with, for each value, the number of tuples that a hash would visit.
    """
    stack: list[int] = []
    marks: list[int] = []  # the stack's heights
    memo: dict[int, int] = {}
    for opcode, argument, at in pickletools.genops(data):
        name, before = opcode.name, opcode.stack_before
        if name in PUTS and argument > at:
            raise StudyError(f"{where}: {name} {argument} at byte {at} of the pickle: it "
                             "asks for more memory than it can fill")  # fmt: skip
        if name in (*PUTS, "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            continue
        if name == "MARK":
            marks.append(len(stack))
            continue
        if pickletools.markobject in before:
            height = marks.pop()
            taken = stack[height:]
            del stack[height:]
            before = before[: before.index(pickletools.markobject)]
        elif name == "POP" and marks and marks[-1] == len(stack):  # it takes a mark away
            marks.pop()
            continue
        else:
            taken = stack[len(stack) - len(before) :]
        del stack[len(stack) - len(before) :]
        if name == "DUP":
            stack += taken * 2
        elif name in GETS:
            stack.append(memo[argument])
        elif name in TUPLES:
            stack.append(1 + sum(taken))
            if stack[-1] > MOST_TUPLES:
                raise StudyError(f"{where}: the pickle has tuples in one another more than "
                                 f"{MOST_TUPLES} times")  # fmt: skip
        else:
            stack += [0] * len(opcode.stack_after)


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
        raise StudyError(f"{self.where}: the pickle refers to something outside it, {repr(pid)}")


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
