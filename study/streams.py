"""Independent parts of a step beside each other on a GPU, in streams of their own.

A pass of a small network is a chain of short kernels that leave most of a GPU idle; the target's
pass needs nothing of the student's, so both may run at once. Which kernels run, and on what, stays
the same, and so do the bits. What fills the GPU by itself goes one after the other, and needs no
memory for both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

SMALL = 1 << 19  # numbers in a batch of images


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def aside(x: Tensor) -> Iterator[Callable[[], None]]:
    """What is launched inside may run while what follows does, until the yielded function is
    called, after which all of it is done. x: the batch, which says whether that pays; on a CPU it
    never does."""
    if not x.is_cuda or x.numel() > SMALL:
        yield lambda: None
        return
    here, other = torch.cuda.current_stream(x.device), _side(x.device)
    other.wait_stream(here)
    with torch.cuda.stream(other):
        yield lambda: here.wait_stream(other)
