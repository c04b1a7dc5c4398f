"""A GPU kept busy: independent parts of a step beside each other, numbers read without a wait.

The passes over a small batch are chains of short kernels that leave most of a GPU idle; the
target's needs nothing of the student's, so both may run at once. Which kernels run, and on what,
stays the same, and so do the bits. A larger batch fills the GPU by itself: its passes follow each
other, and their memory is not needed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

SMALL = 1 << 18  # numbers in a batch of images


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def beside(x: Tensor) -> Iterator[AbstractContextManager]:
    """Yields a context: what is launched under it may run while the rest of the block does, and
    all of it is done after the block. x: the batch, which says whether that pays; on a CPU it
    never does."""
    if not x.is_cuda or x.numel() > SMALL:
        yield nullcontext()
        return
    here, other = torch.cuda.current_stream(x.device), _side(x.device)
    other.wait_stream(here)
    try:
        yield torch.cuda.stream(other)
    finally:  # a fork that is left open would hide what ended the block from whoever captures it
        here.wait_stream(other)


def later(values: Tensor) -> Callable[[], list[float]]:
    """Reads values (n,) when it is called, for which the GPU need not stand still: they are on
    their way from now on, and only they are waited for."""
    if not values.is_cuda:
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return host.tolist()

    return read
