"""What is trained and on what: the kinds of data and of networks, as values of their factors."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from study.values import Count, Kind, Name, Positive, Width


class Digits(Kind, frozen=True, tag="digits"):
    """scikit-learn's 8 x 8 digits: 997 to train on, 400 held out, 400 for the extractor."""


class FashionMnist(Kind, frozen=True, tag="fashion_mnist"):
    """Fashion-MNIST's 28 x 28 images: 50 000 to train on, the 10 000 test images held out, 10 000
    for the extractor. root: folder with its IDX files."""

    root: str | None = None


class Cifar10(Kind, frozen=True, tag="cifar10"):
    """CIFAR-10's 32 x 32 colour images: all 50 000 to train on, of the 10 000 test images half
    held out and half for the extractor. root: folder with its Python archive, whole or
    unpacked."""

    root: str | None = None


class Images(Kind, frozen=True, tag="images"):
    """A folder or .zip of square images of one size, grey or RGB, read from `root`; train/ and
    test/ in it are the parts, else `held_out` of them are set aside. name: tells two such data
    sets apart; a folder may move, so where it lies does not."""

    root: str
    name: Name = "images"
    held_out: Count | None = None


class Mixture(Kind, frozen=True, tag="mixture"):
    """A Gaussian mixture sum_k w_k N(m_k, s_k^2 I) of any dimension, its density known.

    samples: size of the finite training sample; null draws without end. held_out: test sample.
    """

    means: Annotated[
        tuple[Annotated[tuple[float, ...], Meta(min_length=1)], ...], Meta(min_length=1)
    ]
    std: Positive | tuple[Positive, ...]
    weights: tuple[Positive, ...] | None = None
    samples: Count | None = None
    held_out: Count = 2048


class FittedMixture(Kind, frozen=True, tag="fitted_mixture"):
    """Image-sized data of known density: a mixture of Gaussians, of covariance rank-q plus
    diagonal, fitted to an image data set. Its images are real numbers, drawn from the mixture.

    samples: size of the finite training sample; null draws without end. held_out: test sample.
    """

    of: Digits | FashionMnist
    components: Annotated[int, Meta(ge=1, le=1000)] = 60
    rank: Annotated[int, Meta(ge=1, le=32)] = 8
    samples: Count | None = None
    held_out: Count = 400


class Mlp(Kind, frozen=True, tag="mlp"):
    """A multilayer perceptron for vectors."""

    width: Width = 128
    depth: Annotated[int, Meta(ge=1, le=64)] = 3


class Unet(Kind, frozen=True, tag="unet"):
    """A U-Net for square images; `levels` resolutions, channels doubled once below the first.
    patch: pixels a side that are taken together as channels, which the size must be a multiple
    of."""

    width: Annotated[int, Meta(ge=4, le=4096, multiple_of=4)] = 32
    levels: Annotated[int, Meta(ge=1, le=6)] = 2
    blocks: Annotated[int, Meta(ge=1, le=8)] = 1
    patch: Annotated[int, Meta(ge=1, le=8)] = 1


class DdpmPP(Kind, frozen=True, tag="ddpmpp"):
    """EDM's DDPM++ (Karras et al. 2022; Song et al. 2021) under its parameter names; the defaults
    are its CIFAR-10 configuration, 55.7 M parameters at 32 x 32.

    mult: channels at each resolution, from the image's own down by halves, in units of width;
    blocks: residual blocks at each; attention: the resolutions, in pixels a side, that have it.
    """

    width: Annotated[int, Meta(ge=4, le=4096, multiple_of=4)] = 128
    mult: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=16)], ...], Meta(min_length=1, max_length=8)
    ] = (2, 2, 2)
    blocks: Annotated[int, Meta(ge=1, le=8)] = 4
    attention: tuple[Count, ...] = (16,)


Data = Digits | FashionMnist | Cifar10 | Images | Mixture | FittedMixture
Network = Mlp | Unet | DdpmPP
