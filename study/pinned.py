"""What code this is, and a copy of it that later edits do not reach.

The code is named by a digest of the package's own files; where these lie in a git checkout, commit
and uncommitted changes are told beside it. A copy carries what was true where it was made.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from study.store import read_json, write_json

OWN = Path(__file__).parent
TOLD = "code.json"  # beside the package in a copy


def files() -> list[Path]:
    """The package's own files, sorted."""
    return sorted(f for kind in ("*.py", "*.yaml", "*.pt") for f in OWN.rglob(kind))


@cache  # the files may change while a launcher lives
def code() -> dict[str, object]:
    """Digest of the package's own files, and commit and whether it was changed since, None where
    there is no git."""
    sha = hashlib.sha256()
    for file in files():
        sha.update(file.relative_to(OWN).as_posix().encode() + file.read_bytes())
    digest = sha.hexdigest()[:16]
    told = read_json(OWN.parent / TOLD)
    if isinstance(told, dict) and told.get("code") == digest:  # this is a copy, and unchanged
        return told

    def git(*words: str) -> str | None:
        done = subprocess.run(
            ["git", *words], cwd=OWN, text=True, capture_output=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        status = git("status", "--porcelain", "--untracked-files=no", "--", "../study")
        return {
            "code": digest,
            "commit": git("rev-parse", "HEAD"),
            "dirty": None if status is None else bool(status),
        }
    except FileNotFoundError:  # no git on this machine
        return {"code": digest, "commit": None, "dirty": None}


def pin(folder: Path, *others: Path) -> None:
    """Makes `folder` a copy of the package, as study/, and of `others`, whole or not at all; one
    that is there already is left alone."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(mkdtemp(prefix=".pinned", dir=folder.parent))
    made.chmod(0o755)
    for file in files():
        copy = made / "study" / file.relative_to(OWN)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    for file in others:
        shutil.copyfile(file, made / file.name)
    write_json(made / TOLD, code())
    try:
        os.rename(made, folder)
    except OSError:  # another command was quicker
        shutil.rmtree(made)
        if not folder.exists():
            raise
