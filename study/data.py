"""Training data: real images, or mixtures whose population is known.

Real images are kept as uint8 (n, C, S, S) and read as x = v / 127.5 - 1 in [-1, 1]; draws of a
mixture as float32, (n, d) or image-shaped. A data set is finite, or endless: then fresh draws are
made as training asks for them. Images may be augmented by mirroring: x then is drawn from the
training images and their mirror images, all as likely, and that is the law whose posterior scores
and probes consult, while samples are compared with the images as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from study import folder, seeds, subjects
from study.extractors import splits
from study.lowrank import LowRankMixture
from study.mixtures import Density, GaussianMixture
from study.standing import digest

EXACT = 65536  # draws of an endless mixture that its digest covers


@dataclass(frozen=True, eq=False)
class Dataset:
    """One data set on one device.

    train: (n, ...) or None where draws are endless; held_out: (m, ...). density: the population,
    where it is known. std: global standard deviation of the training data (sigma_data). flip:
    whether x is as likely mirrored.
    """

    train: Tensor | None
    held_out: Tensor
    shape: tuple[int, ...]
    std: float
    digest: str
    density: Density | None = None
    flip: bool = False

    @property
    def images(self) -> bool:
        """Whether x is an image."""
        return len(self.shape) == 3

    @property
    def size(self) -> int:
        """How many points x is drawn from, each as likely: the training set, or with flip twice
        as many. Needs finite data."""
        return len(self.train) * (2 if self.flip else 1)

    def at(self, rows: Tensor) -> Tensor:
        """Points number rows (B,) of those `size`, as floats (B, ...): first the training set,
        then with flip its mirror images in the same order."""
        if not self.flip:
            return to_float(self.train[rows])
        n = len(self.train)
        x = to_float(self.train[rows % n])
        return torch.where((rows >= n).view(-1, *(1,) * len(self.shape)), x.flip(-1), x)

    def fresh(self, count: int, generator: torch.Generator) -> Tensor:
        """New draws of the population (count, ...). Needs a known density."""
        return self.density.sample(count, generator)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """x (count, ...) as training meets it, as floats: training data drawn with replacement, or
        fresh draws of endless data."""
        if self.train is None:
            return self.fresh(count, generator)
        device = self.train.device
        return self.at(torch.randint(self.size, (count,), generator=generator, device=device))

    def to(self, device: torch.device) -> Dataset:
        """The same data on another device."""
        return replace(
            self,
            train=None if self.train is None else self.train.to(device),
            held_out=self.held_out.to(device),
            density=self.density and self.density.to(device),
        )


def to_float(x: Tensor) -> Tensor:
    """uint8 images to [-1, 1]; real numbers as they are."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, rounded and clipped; uint8 images as they are."""
    if x.dtype == torch.uint8:
        return x
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def planes(images: np.ndarray) -> Tensor:
    """uint8 images (n, S, S) or (n, S, S, C) as (n, C, S, S)."""
    images = images[..., None] if images.ndim == 3 else images
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def load(data: subjects.Data) -> Dataset:
    """The data set on the CPU. Raises StudyError for a missing or broken file."""
    match data:
        case subjects.Digits():
            parts = splits.of_digits()
        case subjects.FashionMnist(root=root):
            parts = splits.of_fashion_mnist(root and Path(root))
        case subjects.Cifar10(root=root):
            parts = splits.of_cifar10(root and Path(root))
        case subjects.Images(root=root, held_out=held_out):
            parts = folder.load(Path(root), held_out)
        case subjects.Mixture():
            return _mixture(data)
        case subjects.FittedMixture():
            from study import fitted

            density = fitted.density(load(data.of), data.components, data.rank)
            return _population(data, density, density.shape)
        case _:
            assert_never(data)
    x, y = (planes(parts[name][0]) for name in ("train", "held_out"))
    return Dataset(x, y, tuple(x.shape[1:]), float(to_float(x).double().std()), _digest(x, y))


def _mixture(data: subjects.Mixture) -> Dataset:
    """A Gaussian mixture of vectors."""
    modes = len(data.means)
    std = data.std if isinstance(data.std, tuple) else (data.std,) * modes
    density = GaussianMixture.from_lists(data.means, std, data.weights or (1.0,) * modes)
    return _population(data, density, (len(data.means[0]),))


def _population(
    data: subjects.Mixture | subjects.FittedMixture, density: Density, shape: tuple[int, ...]
) -> Dataset:
    """A finite sample of the density or its endless draws; the same for every seed of a study."""

    def draw(count: int, part: str) -> Tensor:
        return density.sample(count, torch.Generator().manual_seed(seeds.number(0, "data", part)))

    train = draw(data.samples, "train") if data.samples else None
    held_out = draw(data.held_out, "held_out")
    if train is not None:
        pinned: tuple[Tensor, ...] = (train,)
    elif isinstance(density, LowRankMixture):
        pinned = tuple(density.tensors.values())
    else:
        pinned = (draw(EXACT, "train"),)
    return Dataset(
        train,
        held_out,
        shape,
        float(density.std()) if train is None else float(train.double().std()),
        _digest(*pinned, held_out),
        density,
    )


def _digest(*parts: Tensor) -> str:
    return digest(*(x.numpy() for x in parts))


class Blocks:
    """A stream of rows addressed by image index, made in blocks of `size` and cut to any batch
    size.

    make(block) -> (size, ...) must depend on the block's number alone.
    """

    SIZE = 512  # of a block of random numbers

    def __init__(self, make: Callable[[int], Tensor], size: int = SIZE) -> None:
        self.make, self.size, self.number, self.block = make, size, -1, torch.empty(0)

    def take(self, start: int, count: int) -> Tensor:
        """Rows start .. start + count of the stream."""
        parts = []
        while count:
            number, offset = divmod(start, self.size)
            if number != self.number:
                self.number, self.block = number, self.make(number)
            part = self.block[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Batch:
    """What the step reads: clean x (B, ...), noise z, uniform u (B,) for the time, and the keys of
    dropout's mask and of the score estimate's own randomness."""

    x: Tensor
    z: Tensor
    u: Tensor
    mask: Tensor
    draw: Tensor


class Draws:
    """Batches addressed by (seed, role, stream, image index): the same for every variant of a
    block at the same image count, whatever the batch size. data_stream makes an A/A twin."""

    def __init__(self, dataset: Dataset, seed: int, role: str, data_stream: int) -> None:
        self.dataset, self.address = dataset, (seed, role, data_stream)
        self.device, shape = dataset.held_out.device, dataset.shape
        size, n = Blocks.SIZE, 0 if dataset.train is None else len(dataset.train)
        here = {"device": self.device}

        def made(
            stream: str,
            draw: Callable[[torch.Generator], Tensor],
            size: int = size,
            device: torch.device = self.device,
        ) -> Blocks:
            def block(index: int) -> Tensor:
                number = seeds.number(*self.address, stream, index)
                return draw(torch.Generator(device).manual_seed(number))

            return Blocks(block, size)

        self.x = made("x", lambda g: dataset.fresh(size, g))
        self.z = made("noise", lambda g: torch.randn(size, *shape, generator=g, **here))
        self.u = made("time", lambda g: torch.rand(size, generator=g, dtype=torch.float64, **here))
        self.flip = made("flip", lambda g: torch.randint(2, (size,), generator=g, **here))
        # a fresh permutation of the training set every epoch
        cpu = torch.device("cpu")
        self.order = made("order", lambda g: torch.randperm(n, generator=g).to(**here), n, cpu)

    def _x(self, start: int, count: int) -> Tensor:
        """Clean x (count, ...), with flip a bit for each image of the stream, mirrored or not."""
        if self.dataset.train is None:
            return self.x.take(start, count)
        rows = self.order.take(start, count)
        if self.dataset.flip:
            rows = rows + len(self.dataset.train) * self.flip.take(start, count)
        return self.dataset.at(rows)

    def __call__(self, start: int, count: int) -> Batch:
        """The batch of training images start .. start + count."""

        def key(stream: str) -> Tensor:
            number = seeds.number(*self.address, stream, start) % 2**31
            return torch.full((), number, device=self.device)  # filled in: no wait for a copy

        return Batch(
            self._x(start, count),
            self.z.take(start, count),
            self.u.take(start, count),
            key("mask"),
            key("draw"),
        )
