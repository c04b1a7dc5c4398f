"""Train the shipped feature extractors: python -m study.extractors.train digits

A classifier fitted closely to few images maps each class to nearly one point, and FID in such
features sees little but class frequencies. Against that: images of its own, random affine maps,
blur and noise, label smoothing and dropout, and a second task: the features must also tell how far
each image was turned, scaled, shifted, blurred and noised, and each colour shifted, so that they
keep what differs within a class and move when a generator blurs. Seeded and on one CPU thread, so
that the same machine writes the same file again: digits in 15 seconds, Fashion-MNIST in four
minutes, CIFAR-10 in ten. --root says where the images lie, and of CIFAR-10 it may be a folder of
images, train/CLASS and test/CLASS.
"""

import argparse
import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from study.data import planes, to_float
from study.errors import StudyError
from study.extractors import splits
from study.extractors.load import EXTRACTORS, Shape, SmallCNN
from study.extractors.names import FOLDER
from study.store import write_bytes

SEED = 0
BATCH = 100
CHUNK = 512  # images per pass when accuracy is told
RATE = 3e-3
WEIGHT_DECAY = 0.05
DROPOUT = 0.1
SMOOTHING = 0.1
CHANGES = 6  # angle, scale, two shifts, blur, noise; the largest of each:
ROTATION = 0.2  # radians
SCALING = 0.1  # relative
BLUR = 0.5  # share of the mean over 3 x 3 pixels
NOISE = 0.15  # standard deviation where pixels span [-1, 1]
TINT = 0.2  # of colours, where pixels span [-1, 1]; a change more for each colour
AUXILIARY = 2.0  # weight of the mean squared error of the changes, each within -1..1


class Recipe(NamedTuple):
    """What differs between data: where the images come from, updates and the largest shift."""

    split: Callable[..., dict[str, tuple[np.ndarray, np.ndarray]]]  # of a root, or of nothing
    steps: int
    shift: float  # of half the image's width
    photos: bool = False  # as likely mirrored, and without a background to fill the border with


RECIPES = {
    "digits": Recipe(splits.of_digits, steps=2000, shift=0.2),
    # Garments fill the frame: a shift by more than a pixel or two cuts off sleeves and soles.
    "fashion_mnist": Recipe(splits.of_fashion_mnist, steps=6000, shift=0.1),
    "cifar10": Recipe(splits.of_cifar10_or_folder, steps=7000, shift=0.15, photos=True),
}


def train(images: np.ndarray, labels: np.ndarray, shape: Shape, recipe: Recipe) -> SmallCNN:
    """Train a SmallCNN on images (n, size, size), or (n, size, size, channels), uint8 and labels
    (n,), in eval mode at the end.

    AdamW under a cosine schedule, on one CPU thread; the caller's thread count is restored.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    x = to_float(planes(images))
    y = torch.from_numpy(labels).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # initial weights and dropout take no generator
        network = SmallCNN(shape, DROPOUT)
        changes = CHANGES + (shape.channels if shape.channels > 1 else 0)
        probe = nn.Linear(shape.features, changes)  # dropped after training
        weights = [*network.parameters(), *probe.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=WEIGHT_DECAY)
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            rows = torch.randint(len(x), (BATCH,), generator=generator)
            changed, change = augment(x[rows], changes, recipe, generator)
            features = network(changed)
            logits = network.head(features)
            loss = functional.cross_entropy(logits, y[rows], label_smoothing=SMOOTHING)
            loss = loss + AUXILIARY * functional.mse_loss(probe(features), change)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return network.eval()


def augment(
    x: Tensor, changes: int, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Turn, scale, shift and blur each image of x (B, C, H, W) in [-1, 1] a little, shift its
    colours, add noise.

    Returns the changed images and the size of each change in -1..1, (B, changes).
    """
    change = 2 * torch.rand(len(x), changes, generator=generator) - 1
    angle, scale = ROTATION * change[:, 0], 1 + SCALING * change[:, 1]
    shift, (blur, noise) = recipe.shift * change[:, 2:4], (change[:, 4:6].T + 1) / 2
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)
    affine = torch.cat([scale[:, None, None] * turn, shift[:, :, None]], 2)
    grid = functional.affine_grid(affine, list(x.shape), align_corners=False)
    if recipe.photos:
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(mirrored, x.flip(-1), x)
    # Outside is background, -1, where grid_sample pads with zeros.
    padding = "reflection" if recipe.photos else "zeros"
    x = functional.grid_sample(x + 1, grid, padding_mode=padding, align_corners=False)
    smooth = functional.avg_pool2d(x, 3, 1, 1)
    x = torch.lerp(x, smooth, BLUR * blur[:, None, None, None]) - 1
    z = torch.randn(x.shape, generator=generator)
    x = x + NOISE * noise[:, None, None, None] * z
    if changes > CHANGES:
        x = x + TINT * change[:, CHANGES:, None, None]
    return x, change


@torch.no_grad()
def classes(network: SmallCNN, images: np.ndarray) -> np.ndarray:
    """The likeliest class (n,) of each of the images (n, size, size) or (n, size, size, channels),
    uint8."""
    chunks = planes(images).split(CHUNK)
    found = [network.head(network(to_float(x))).argmax(1) for x in chunks]
    return torch.cat(found).numpy()


def write(network: SmallCNN, path: Path) -> None:
    """Write the state_dict, whole. The buffer keeps the file's name out of its bytes."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    write_bytes(path, buffer.getvalue())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: trains, tells accuracies, writes the weights. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m study.extractors.train", description=__doc__)
    parser.add_argument("data", choices=RECIPES)
    parser.add_argument("--root", type=Path, help="the images' folder, if not the usual one")
    given = parser.parse_args(arguments)
    recipe, name = RECIPES[given.data], f"{given.data}-cnn"
    if given.root and given.data == "digits":
        parser.error("--root: digits come with scikit-learn")
    try:
        parts = recipe.split(given.root) if given.root else recipe.split()
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    network = train(*parts["extractor"], EXTRACTORS[name], recipe)
    for part, (images, labels) in parts.items():
        accuracy = np.mean(classes(network, images) == labels)
        print(f"{part}: accuracy {accuracy:.4f} of {len(labels)}")
    write(network, FOLDER / f"{name}.pt")
    print(f"wrote {FOLDER / f'{name}.pt'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
