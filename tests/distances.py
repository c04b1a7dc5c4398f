"""FID between two feature sets, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from study.evaluate import frechet, statistics


def fid(a: Tensor, b: Tensor) -> float:
    """Frechet distance of features (n, F), as measurements make it on a CPU."""
    return frechet(*(statistics(x, torch.device("cpu")) for x in (a, b)))
