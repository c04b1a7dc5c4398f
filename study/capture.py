"""The step's fast form on a GPU: networks compiled, and loss, gradient and the optimiser's update
replayed as one CUDA graph.

The arithmetic is that of `Problem.backward` and the optimiser: the graph holds the kernels that
they launch, on buffers that every batch is copied into. On a CPU the same step runs as it is
written.
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

WARM_UP = 3  # gradients before the capture, in which kernels are compiled and workspaces made

Step = Callable[[Batch, float, float], Tensor]  # of a batch, N and progress: the loss


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


def step(problem: Problem, optimizer: torch.optim.Optimizer, example: Batch) -> Step:
    """One update of the weights of problem.net on a batch; its gradient stays in their .grad.
    example: any batch. The optimiser is as it was until the first call."""
    cuda = example.x.is_cuda
    for group in optimizer.param_groups:
        group["capturable"] = cuda
    if cuda:
        return Captured(problem, optimizer, example)

    def plain(batch: Batch, N: float, progress: float) -> Tensor:
        loss = problem.backward(batch, *problem.levels(batch, N), progress)
        optimizer.step()
        return loss

    return plain


def begun(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimiser's state, where it has none yet: by a step along gradients of zero, which
    moves nothing, and is not counted. A count that a CPU made goes where the weights are."""
    weights = [w for group in optimizer.param_groups for w in group["params"]]
    if not optimizer.state:
        for w in weights:
            w.grad = torch.zeros_like(w)
        optimizer.step()
        for w in weights:
            optimizer.state[w]["step"].zero_()
    for w in weights:
        optimizer.state[w]["step"] = optimizer.state[w]["step"].to(w.device)


class Captured:
    """Loss, backward pass and update as one CUDA graph. The graph owns the gradients and the loss:
    they hold until the next call. Weights and the optimiser's state are read and moved where they
    lie."""

    def __init__(self, problem: Problem, optimizer: torch.optim.Optimizer, example: Batch) -> None:
        self.batch = Batch(*(getattr(example, f.name).clone() for f in fields(Batch)))
        self.N, self.progress = (
            torch.tensor(value, dtype=torch.float64, device=example.x.device) for value in (2, 1)
        )
        self.held = problem, optimizer  # what the graph reads and moves has to stay
        begun(optimizer)

        def backward() -> Tensor:
            r, t = problem.levels(self.batch, self.N)
            return problem.backward(self.batch, r, t, self.progress)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                backward()
        torch.cuda.current_stream().wait_stream(stream)
        problem.net.zero_grad()  # to None: the capture then makes gradients of its own
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = backward()
            optimizer.step()

    def __call__(self, batch: Batch, N: float, progress: float) -> Tensor:
        """The loss (scalar) before the update; nothing waits for the GPU."""
        for f in fields(Batch):
            getattr(self.batch, f.name).copy_(getattr(batch, f.name))
        self.N.fill_(N)
        self.progress.fill_(progress)
        self.graph.replay()
        return self.loss
