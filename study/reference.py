"""What samples are compared with: features of real images, and the statistics of these.

FID needs no more of n real images than the mean and covariance of their features. Those of
InceptionV3, which take minutes on a CPU, are kept in a cache folder under the digests of weights
and data, the part, n, and the device, whose rounding is its own; every process then has the same.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from study import evaluate, seeds
from study.bounded import packed as packed_up
from study.data import Dataset, to_uint8
from study.errors import StudyError
from study.evaluate import Statistics
from study.extractors import inception
from study.extractors.inception import Inception
from study.extractors.names import is_inception
from study.folder import kept
from study.identity import digest
from study.settings import Settings

STATISTICS = 3  # raise it when the same images and weights come to other statistics


def check(asked: Iterable[Settings], dataset: Dataset) -> None:
    """Before anything is trained: the data have what samples will be compared with, and
    InceptionV3's weights are there, or are downloaded now. Raises StudyError."""
    needed = set()
    for settings in asked:
        record = settings.record
        if "extractor" in record:
            part_of(dataset, record["samples"], record.get("reference", "train"))
            needed.add((record["extractor"], settings.weights))
    for identity, weights in needed:
        if is_inception(identity):
            inception.checked_file(identity, weights)


def part_of(dataset: Dataset, n: int, part: str) -> Tensor | None:
    """The training or held-out images, None for endless ones. Raises StudyError where there are
    fewer than n."""
    x = {"train": dataset.train, "held_out": dataset.held_out}[part]
    if x is not None and len(x) < n:
        hint = "" if part == "train" else "; `reference: [train]` asks for no such comparison"
        raise StudyError(f"{n} samples asked for, and the data have {len(x)} {part} images to "
                         f"compare them with{hint}")  # fmt: skip
    return x


def images(dataset: Dataset, n: int, part: str) -> Tensor:
    """n images of a part, training or held-out: a fixed choice, the same for every run and study,
    and all of them where there are n. Of endless data n draws of the population, the same on every
    device. Raises StudyError where there are fewer."""
    x, generator = part_of(dataset, n, part), torch.Generator()
    generator.manual_seed(seeds.number(0, "reference", part))
    if x is None:
        return dataset.to(torch.device("cpu")).fresh(n, generator)
    return x[torch.randperm(len(x), generator=generator)[:n].to(x.device)]


@lru_cache(maxsize=4)  # at 50 000 images InceptionV3's are 410 MB each
def features(dataset: Dataset, n: int, part: str, net: nn.Module) -> Tensor:
    """Features (n, F) on the CPU of the reference images of a part."""
    x = images(dataset, n, part).to(dataset.held_out.device)
    return evaluate.features(to_uint8(x), net)


@cache
def classes(dataset: Dataset, n: int, net: nn.Module) -> Tensor:
    """Class logits (n, classes) of n training images."""
    x = images(dataset, n, "train").to(dataset.held_out.device)
    return evaluate.classes(to_uint8(x), net)


@cache
def statistics(dataset: Dataset, n: int, part: str, net: nn.Module) -> Statistics:
    """Mean and covariance of these features. InceptionV3's are read from the cache folder; a file
    that is torn is made again."""

    def make() -> Statistics:
        return evaluate.statistics(features(dataset, n, part, net), device)

    device = dataset.held_out.device
    if not isinstance(net, Inception):
        return make()
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    settings = {"statistics": STATISTICS, "extractor": f"{net.name}:{net.digest}",
                "data": dataset.digest, "part": part, "n": n, "device": named}  # fmt: skip
    name = f"statistics-{digest(settings, 16)}.npz"
    return kept(name, "the reference statistics", unpacked, make, packed)


def packed(found: Statistics) -> bytes:
    """Statistics as an npz file."""
    file = io.BytesIO()
    np.savez(file, mu=found["mu"], sigma=found["sigma"])
    return file.getvalue()


def unpacked(path: Path) -> Statistics | None:
    """Statistics, or None where the file is missing, torn (it has a checksum) or not ours."""
    try:
        if packed_up(path):
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            mu, sigma = arrays["mu"], arrays["sigma"]
            ours = mu.shape == (inception.FEATURES,) and sigma.shape == mu.shape * 2
            ours &= sigma.dtype == np.float64
    except Exception:  # whatever a torn file leads the reader to
        return None
    return {"mu": mu, "sigma": sigma} if ours else None


@cache
def floor(kind: str, dataset: Dataset, n: int, net: nn.Module) -> float | None:
    """FID or KID of n held-out to n training images; None where fewer are held out."""
    if len(dataset.held_out) < n:
        return None
    distance, of = {"fid": (evaluate.frechet, statistics), "kid": (evaluate.kid, features)}[kind]
    return distance(*(of(dataset, n, part, net) for part in ("held_out", "train")))
