"""Errors that a user can mend, and the wording that these and other lines share: codes that would
command a terminal written out, the nearest allowed name, numbers of things."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class StudyError(Exception):
    """What a user can mend: names the file or folder, the key, what was given and what is
    allowed."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """The text without the codes that would command a terminal, each written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def nearest(given: object, allowed: Iterable[object]) -> str:
    """'; did you mean X?' or the list of what is allowed."""
    names = sorted(str(a) for a in allowed)
    close = difflib.get_close_matches(str(given), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(names) or 'nothing'}"


def several(n: float, what: str) -> str:
    """A number of things: "1 seed", "2 seeds", "2 mismatches"."""
    return f"{n:,.0f} {what}" + ("" if n == 1 else "es" if what.endswith("ch") else "s")


def lasting(seconds: float) -> str:
    """A length of time: "12 seconds", "1.5 minutes", "2.3 hours"."""
    if seconds < 60:
        return f"{seconds:.2g} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def listed(what: str, values: Iterable[object]) -> str:
    """Things by number or name, each once and in order: "seed 0", "seeds 0, 1"."""
    found = sorted(set(values))
    return f"{what}{'s' * (len(found) > 1)} {', '.join(map(str, found))}"


def command(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the command's exit status: 130 after Ctrl-C, in one line."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
