"""Whether what lies in a run's folder is of one training.

trained.json is written last and vouches for the rest: it holds the SHA-256 of steps.jsonl, whose
rows have seconds that no second training repeats, and the digest of the line in attempts.jsonl
that the attempt began with which wrote it. Where two machines worked on one run and its files
were copied one by one, the halves of two trainings can come to lie in one folder: its numbers are
the one's, its log and its device the other's. Both logs are short, so every command can look.
A measurement holds the SHA-256 of its snapshot: one of another training's is made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study.bounded import content
from study.errors import StudyError

ATTEMPTS, STEPS = "attempts.jsonl", "steps.jsonl"


def begun(attempts: bytes | None) -> list[str]:
    """Digests of the lines of attempts.jsonl that attempts began with, the last one's last."""
    lines = (attempts or b"").splitlines()
    return [hashlib.sha256(x).hexdigest()[:16] for x in lines if b'"start"' in x]


def settled(folder: Path) -> str | None:
    """The digest of the attempt that is at work, or None where no attempt is told of. Both logs
    are on the disk afterwards: trained.json, which is to vouch for them, must not precede them."""
    for path in (folder / ATTEMPTS, folder / STEPS):
        if path.exists():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    return next(reversed(begun(content(folder / ATTEMPTS))), None)


def mixed(trained: Mapping[str, Any], attempts: bytes | None, steps: bytes | None) -> str | None:
    """Which of the logs is of another training than trained.json; None where neither is, or where
    it can't be told: without a log of steps, or of a run that was trained before attempts were
    told apart."""
    known = trained.get("sha256", {}).get(STEPS)
    if steps is not None and known not in (None, hashlib.sha256(steps).hexdigest()):
        return f"{STEPS} is not the log of the training that trained.json tells of"
    if trained.get("attempt") not in (None, *begun(attempts)):
        return f"{ATTEMPTS} lacks the attempt that wrote trained.json"
    return None


def foreign(trained: Mapping[str, Any], file: str, measurement: Mapping[str, Any]) -> bool:
    """Whether a measurement, in a file PROGRESS-..., is of other weights than those that
    trained.json tells of; one that does not say is not, and without trained.json none is."""
    known = trained.get("sha256", {}).get(f"snapshots/{file.split('-')[0]}.pt")
    return bool(trained) and measurement.get("snapshot") not in (None, known)


def check_whole(trained: Mapping[Path, Mapping[str, Any] | None]) -> None:
    """None of these folders, each with its trained.json, holds the halves of two trainings, else
    a StudyError that names all that do."""
    halves = [
        f"{folder}: two halves of one run: {why}"
        for folder, facts in trained.items()
        if facts and (why := mixed(facts, content(folder / ATTEMPTS), content(folder / STEPS)))
    ]
    if halves:
        raise StudyError("\n".join(halves) + "\nremove such a folder to have the run made again, "
                         "or copy it whole from the machine that finished it")  # fmt: skip
