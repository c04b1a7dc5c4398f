"""The step's fast form on a GPU: networks compiled, loss and gradient replayed as one CUDA graph.

The arithmetic is that of `Problem.loss` and `backward`: the graph holds the kernels that they
launch, on buffers that every batch is copied into. On a CPU the same step runs as it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from study.consistency import Function
from study.data import Batch
from study.errors import StudyError
from study.losses import Problem

WARM_UP = 3  # steps before the capture, in which kernels are compiled and workspaces made

Gradient = Callable[[Batch, float, float], Tensor]  # leaves d loss / d w in w.grad; the loss


def usable(name: str) -> torch.device:
    """The device, where torch can use it. Raises StudyError where it can't."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise StudyError(f"{name}: torch finds no GPU that it can use here; use --device cpu")
    return torch.device(name)


def compiled(net: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, its kernels fused there on a GPU. Same parameters and names."""
    net.to(device)
    if device.type == "cuda":
        net.compile(fullgraph=True, dynamic=False)
    return net


def in_rows(function: Function, rows: int, device: torch.device) -> Function:
    """function(x, t) evaluated on a GPU in pieces of exactly `rows`, the last one padded: what is
    compiled for the training batch then serves every other size. On a CPU, the function itself."""

    def padded(x: Tensor, t: Tensor) -> Tensor:
        if len(x) == rows:
            return function(x, t)
        more = -len(x) % rows
        whole = F.pad(x, (0, 0) * (x.ndim - 1) + (0, more)), F.pad(t, (0, more), value=1.0)
        pieces = zip(*(part.split(rows) for part in whole), strict=True)
        return torch.cat([function(*piece) for piece in pieces])[: len(x)]

    return padded if device.type == "cuda" else function


def gradient(problem: Problem, example: Batch) -> Gradient:
    """The loss of a batch and, in the parameters' .grad, its gradient. example: any batch."""
    if example.x.device.type == "cuda":
        return Captured(problem, example)

    def plain(batch: Batch, N: float, progress: float) -> Tensor:
        problem.net.zero_grad()
        loss = problem.loss(batch, N, progress)
        loss.backward()
        return loss.detach()

    return plain


class Captured:
    """Loss and backward pass as one CUDA graph. The graph owns the gradients and the loss: they
    hold until the next call. Weights are read where they lie, so an optimiser may move them."""

    def __init__(self, problem: Problem, example: Batch) -> None:
        self.batch = Batch(*(getattr(example, f.name).clone() for f in fields(Batch)))
        self.N, self.progress = (
            torch.tensor(value, dtype=torch.float64, device=example.x.device) for value in (2, 1)
        )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                problem.net.zero_grad()
                problem.loss(self.batch, self.N, self.progress).backward()
        torch.cuda.current_stream().wait_stream(stream)
        problem.net.zero_grad()  # to None: the capture then makes gradients of its own
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            loss = problem.loss(self.batch, self.N, self.progress)
            loss.backward()
        self.loss = loss.detach()

    def __call__(self, batch: Batch, N: float, progress: float) -> Tensor:
        """The loss (scalar); nothing waits for the GPU."""
        for f in fields(Batch):
            getattr(self.batch, f.name).copy_(getattr(batch, f.name))
        self.N.fill_(N)
        self.progress.fill_(progress)
        self.graph.replay()
        return self.loss
