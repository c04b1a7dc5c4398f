"""One run in training: the student's weights, their averages, the optimiser, and its update.

An update is a pure function of the image count: the batch, the number of grid points and the
target's decay are all addressed by it, so a resumed run does the same bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from study import schedules
from study.capture import compiled, step
from study.data import Dataset, Draws
from study.models import Lookup, initial, make_optimizer, make_problem
from study.spec import Run
from study.weights import average, power_gamma


def second_moment(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Adam's running mean of squared gradients, its bias corrected, by parameter name."""
    beta = optimizer.param_groups[0]["betas"][1]
    states = {name: optimizer.state[w] for name, w in weights.items()}
    return {name: s["exp_avg_sq"] / (1 - beta ** float(s["step"])) for name, s in states.items()}


@contextmanager
def counted() -> Iterator[Callable[[], float]]:
    """Yields how many FLOPs have been computed inside: multiply-adds, counted twice. Attention is
    computed as products, which torch counts in every version and on every device."""
    with (
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        yield lambda: float(counter.get_total_flops())


class Student:
    """A run's network on a device with all that its training holds. net: its first weights."""

    def __init__(
        self,
        run: Run,
        sources: Mapping[str, Run],
        lookup: Lookup,
        dataset: Dataset,
        device: torch.device,
        net: nn.Module,
    ) -> None:
        factors = self.factors = run.recipe.factors
        self.net = compiled(net, device)
        self.problem = make_problem(run, sources, lookup, dataset, device, self.net)
        self.draws = Draws(dataset, run.seed, run.recipe.role, factors.data_stream)
        self.optimizer = make_optimizer(factors.optimizer, self.net)
        self.weights = list(self.net.parameters())
        self.gammas = [power_gamma(length) for length in factors.weights_ema]
        self.averages = [[w.detach().clone() for w in self.weights] for _ in self.gammas]
        follow = {"target": self.problem.average, "own": self.problem.own}
        self.followers = {name: net for name, net in follow.items() if net is not None}

    def flops(self) -> float:
        """FLOPs of one step, on a real one; leaves gradients behind."""
        with counted() as flops:
            batch = self.draws(0, self.factors.batch)
            self.problem.backward(batch, *self.problem.levels(batch, 2))
        return flops()

    def capture(self) -> None:
        """Makes the step in its fast form. Before the first update."""
        self.step = step(self.problem, self.optimizer, self.draws(0, self.factors.batch))

    def update(self, images: int) -> tuple[Tensor, int]:
        """One update after so many images: its loss, not waited for, and N."""
        factors = self.factors
        progress = images / factors.budget.images
        N = schedules.grid_points(factors.discretization, progress)
        loss = self.step(self.draws(images, factors.batch), N, progress)
        average(self.averages, self.weights, self.gammas, images // factors.batch + 1)
        for name, follower in self.followers.items():
            decay = (
                schedules.target_decay(factors.target, N)
                if name == "target"
                else factors.score.mu
            )
            with torch.no_grad():
                torch._foreach_lerp_(list(follower.parameters()), self.weights, 1 - decay)
        return loss, N

    def gradient_norm(self) -> Tensor:
        """L2 norm of the last update's gradient, not waited for."""
        return torch.stack(torch._foreach_norm([w.grad for w in self.weights])).norm()

    def snapshot(self) -> dict[str, Any]:
        """What a measurement may read: raw weights, averages by length, followers, moments."""
        names = [name for name, _ in self.net.named_parameters()]
        lengths = (str(length) for length in self.factors.weights_ema)
        averages = (dict(zip(names, average, strict=True)) for average in self.averages)
        return {
            "raw": self.net.state_dict(),
            "ema": dict(zip(lengths, averages, strict=True)),
            "second_moment": second_moment(self.optimizer, dict(self.net.named_parameters())),
            **{name: follower.state_dict() for name, follower in self.followers.items()},
        }

    def state(self) -> dict[str, Any]:
        """All that the next update reads."""
        return {
            "net": self.net.state_dict(),
            **{name: follower.state_dict() for name, follower in self.followers.items()},
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state, before `capture`."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.weights[0].device
        self.averages = [[a.to(device) for a in average] for average in state["averages"]]
        for name, follower in self.followers.items():
            follower.load_state_dict(state[name])


def batch_that_fits(
    run: Run,
    sources: Mapping[str, Run],
    lookup: Lookup,
    dataset: Dataset,
    device: torch.device,
) -> int:
    """The largest batch of this run that the GPU has memory for, about: an eighth and a quarter of
    its own are tried, without compiling, and memory is taken to grow by the image. 0 where not
    even these fit."""
    factors, peaks = run.recipe.factors, {}
    for rows in {max(1, factors.batch // 8), max(1, factors.batch // 4)}:
        smaller = msgspec.structs.replace(factors, batch=rows)
        tried = replace(run, recipe=replace(run.recipe, factors=smaller))
        free_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            net = initial(tried, sources, lookup, dataset)
            student = Student(tried, sources, lookup, dataset, device, net)
            student.flops()
            student.optimizer.step()
        except torch.OutOfMemoryError:
            return 0
        peaks[rows] = torch.cuda.max_memory_allocated(device)
        del net, student
    return largest_batch(peaks, free_memory(device), factors.batch)


def free_memory(device: torch.device) -> int:
    """Bytes of the GPU that this process may use: what nobody holds, or torch holds for nothing,
    and what its tensors hold."""
    gc.collect()  # a compiled network is in a cycle with itself
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)


def largest_batch(peaks: Mapping[int, int], room: int, below: int) -> int:
    """The largest batch under `below` whose memory stays in `room` bytes, on the line through the
    peaks (bytes) of some smaller batches; in eights, where there are as many."""
    (few, low), *_, (many, high) = sorted(peaks.items())
    per_row = (high - low) / (many - few) if many > few else high / many
    fits = int(many + (room - high) / per_row)
    fits = max(many, min(fits, below - 1))
    return fits - fits % 8 if fits > 8 else fits
