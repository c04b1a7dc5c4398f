"""Weights on disk and their averages.

Averages are power functions (EDM2, Karras et al. 2024), beta_n = (1 - 1/n)^(gamma + 1), whose
width is a fixed share of training whatever its length.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from study.bounded import packed
from study.errors import StudyError
from study.store import Folder, sha256, write_bytes


def power_gamma(length: float) -> float:
    """gamma whose averaging profile t^gamma has standard deviation `length` of the training time:
    length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, eq. 126)."""
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


@torch.no_grad()
def average(
    averages: list[list[Tensor]], weights: list[Tensor], gammas: list[float], update: int
) -> None:
    """Moves every running average (in place) to include the weights after `update` (from 1)."""
    for average, gamma in zip(averages, gammas, strict=True):
        torch._foreach_lerp_(average, weights, 1 - (1 - 1 / update) ** (gamma + 1))


def load_tensors(path: Path) -> Any:  # noqa: ANN401
    """A file of tensors, read without executing anything. Raises StudyError on a torn one, and on
    a packed one, which could come to any size."""
    try:
        if packed(path):
            raise ValueError("packed, as torch writes no file of weights")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or forged file leads its reader to raise anything
        raise StudyError(f"{path}: cannot be read as weights: {_told(error)}") from None


def _told(error: Exception) -> str:
    """torch's error in one line, without its advice to read the file by executing it."""
    words = str(error)
    if asked := re.search(r"GLOBAL ([\w.]+)", words):
        return f"it asks for {asked[1]}, which is not executed"
    if isinstance(error, UnpicklingError) or re.search("file in archive|weights_only", words):
        return "it is no file of weights"
    return (words.splitlines() or [repr(error)])[0].partition(". ")[0][:300]


def save_tensors(path: Path, value: object) -> None:
    """Writes tensors whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def snapshot_name(at: float) -> str:
    """The snapshot's file at a share of the budget."""
    return f"snapshots/{at:.3f}.pt"


def weights_at(folder: Folder, at: float, ema: float) -> dict[str, Tensor]:
    """The averaged weights of one snapshot by parameter name. Raises as `snapshot_at`."""
    return snapshot_at(folder, at)["ema"][str(ema)]


def snapshot_at(folder: Folder, at: float) -> dict[str, Any]:
    """Everything of one snapshot: raw weights, averages, target, the optimiser's second moment.

    Raises StudyError where the file is gone, or is not the one that training wrote.
    """
    path = folder.file(snapshot_name(at))
    if not path.is_file():
        raise StudyError(f"{path}: gone; without weights nothing can be re-measured or built on")
    if sha256(path) != folder.digest(snapshot_name(at)):
        raise StudyError(f"{path}: not the file that training wrote (its SHA-256 has changed)")
    return load_tensors(path)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, 16 hex digits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().cpu().numpy().tobytes())
    return total.hexdigest()[:16]
