"""What a job starts with: the copy of the package that was pinned for it, or nothing.

Nothing of the package is imported before the copy is found to be what was submitted, and then all
of it comes from there: a path or an installation that has the package too is not asked. A file
that is gone, as where old files are purged, ends the job and is never taken from elsewhere. Only
the standard library is used here.
"""

from __future__ import annotations

import hashlib
import runpy
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent.name
AGAIN = "remove what is left of it, and the same command makes another"


def digest(folder: Path, files: Iterable[Path] | None = None) -> str:
    """Digest of files in a folder, of all by default: names and bytes."""
    sha = hashlib.sha256()
    for file in sorted(p for p in files or folder.rglob("*") if not p.is_dir()):
        name, data = file.relative_to(folder).as_posix(), file.read_bytes()
        sha.update(f"{name}\0{len(data)}\0".encode() + data)
    return sha.hexdigest()


class Only:
    """Finds the package's modules in one folder and nowhere else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> ModuleSpec | None:  # fmt: skip
        """As importlib asks for it. Raises ModuleNotFoundError where the folder has no such
        module."""
        if name.partition(".")[0] != PACKAGE:
            return None
        place = self.folder.joinpath(*name.split(".")[:-1])
        found = PathFinder.find_spec(name, [str(place)], target)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(f"{name}: not in {self.folder} any more, the copy of the "
                                      "code that this job was given", name=name)  # fmt: skip
        return found


def main(folder: Path, expected: str, payload: str) -> None:
    """Runs a payload of submitit's on the code in `folder`, or leaves and says why not."""
    try:
        same = digest(folder) == expected
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}: the copy of the code that this job "
                 f"was given can't be read; {AGAIN}")  # fmt: skip
    if not same:
        sys.exit(f"error: {folder}: not the copy of the code that this job was given: files of it "
                 f"were removed, changed or added since; {AGAIN}")  # fmt: skip
    sys.meta_path.insert(0, Only(folder))
    sys.argv = ["submitit", payload]
    runpy.run_module("submitit.core._submit", run_name="__main__")


if __name__ == "__main__":  # as python -u FILE DIGEST ... FOLDER
    main(Path(__file__).parents[1], sys.argv[1], sys.argv[-1])
