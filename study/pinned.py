"""What code this is, and a copy of it that later edits do not reach.

The code is named by a digest of the package's own files; where these lie in a git checkout, commit
and uncommitted changes are told beside it. A copy carries what was true where it was made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from study import sealed
from study.errors import StudyError
from study.store import read_json, write_json

OWN = Path(__file__).parent
TOLD, GIVEN = "code.json", "given"  # beside the package in a copy; what was given lies apart
# An empty file where Python would make a folder for bytecode: whoever looks at the copy with a
# Python of his own adds nothing to it, root or not, and it can be removed like any folder.
NO_BYTECODE = "__pycache__"


def files(own: Path = OWN) -> list[Path]:
    """The package's own files, sorted."""
    return sorted(f for kind in ("*.py", "*.yaml", "*.pt") for f in own.rglob(kind))


def digest(own: Path = OWN) -> str:
    """Digest of the package's own files."""
    return sealed.digest(own, files(own))[:16]


@cache  # the files may change while a launcher lives
def code() -> dict[str, object]:
    """Digest of the package's own files, and commit and whether it was changed since, None where
    there is no git."""
    own = digest()
    told = read_json(OWN.parent / TOLD)
    if isinstance(told, dict) and told.get("code") == own:  # this is a copy, and unchanged
        return told

    def git(*words: str) -> str | None:
        done = subprocess.run(
            ["git", *words], cwd=OWN, text=True, capture_output=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        status = git("status", "--porcelain", "--untracked-files=no", "--", "../study")
        return {
            "code": own,
            "commit": git("rev-parse", "HEAD"),
            "dirty": None if status is None else bool(status),
        }
    except FileNotFoundError:  # no git on this machine
        return {"code": own, "commit": None, "dirty": None}


def pin(folder: Path, *others: Path) -> None:
    """Makes `folder` a copy of the package, as study/, and of `others`, in given/, whole or not at
    all; one that is there already is left alone. Raises StudyError where it can't be made, and
    where it is not this code and these files, and nothing else: jobs would run what somebody put
    there."""
    try:
        if not folder.exists():
            _copy(folder, others)
        _check(folder, others, "not the copy that was made for jobs; remove it")
    except OSError as error:
        raise StudyError(f"{folder}: no copy for jobs can be made: {error.strerror}") from None


def _copy(folder: Path, others: Sequence[Path]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".pinned", dir=folder.parent) as place:
        made = Path(place) / folder.name
        copies = {f: made / "study" / f.relative_to(OWN) for f in files()}
        for file, copy in (copies | {f: made / GIVEN / f.name for f in others}).items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        for place_of in {copy.parent for copy in copies.values()}:
            (place_of / NO_BYTECODE).touch()
        write_json(made / TOLD, code())
        try:
            _check(made, others, "changed while it was copied; give the command again")
            os.rename(made, folder)
        except (OSError, StudyError):
            if not folder.exists():  # else another command was quicker
                raise


def _check(folder: Path, others: Sequence[Path], why: str) -> None:
    """The folder holds this code, these files and nothing else, else StudyError."""
    expected = {Path("study") / f.relative_to(OWN) for f in files()}
    expected |= {f.parent / NO_BYTECODE for f in expected}
    expected |= {Path(TOLD), *(Path(GIVEN, f.name) for f in others)}
    there = [p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]
    same = {p.relative_to(folder) for p in there} == expected
    same = same and not any(p.is_symlink() for p in there)
    same = same and digest(folder / "study") == code()["code"]
    if not same or any((folder / GIVEN / f.name).read_bytes() != f.read_bytes() for f in others):
        raise StudyError(f"{folder}: {why}")
