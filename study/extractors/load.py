"""Feature extractors for FID and KID: small classifiers, loaded by name from this folder.

The features are the classifier's last hidden layer (as Inception's pool is in the usual FID); FID
compares the mean and covariance of these features over two sets of images (Heusel et al. 2017,
arXiv 1706.08500). A number measured with one extractor means nothing beside another's, so the
digest of the weights belongs to the measurement's name.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from study.data import to_float
from study.extractors.names import FOLDER


class Shape(NamedTuple):
    """What fixes a SmallCNN: images of channels x size x size, first width, features, classes."""

    size: int
    width: int
    features: int
    classes: int
    channels: int = 1

    @property
    def image(self) -> tuple[int, int, int]:
        """Shape of one image."""
        return self.channels, self.size, self.size


class SmallCNN(nn.Module):
    """Three 3x3 convolutions, average pooling to 4 x 4, a hidden layer (the features), a head.

    Dropout acts on the features, so that no class leans on a few of them.
    """

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        width = shape.width
        self.trunk = nn.Sequential(
            nn.Conv2d(shape.channels, width, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * 2 * width, shape.features),
            nn.SiLU(),
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(shape.features, shape.classes))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, features) of images (B, channels, size, size) in [-1, 1]."""
        return self.trunk(x)


EXTRACTORS = {
    "digits-cnn": Shape(size=8, width=16, features=32, classes=10),
    "fashion_mnist-cnn": Shape(size=28, width=24, features=64, classes=10),
    "cifar10-cnn": Shape(size=32, width=32, features=64, classes=10, channels=3),
}


class Extractor(nn.Module):
    """A trained SmallCNN in eval mode that takes uint8 images."""

    def __init__(self, name: str, network: SmallCNN) -> None:
        super().__init__()
        self.name, self.network = name, network
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, features), float32, of uint8 images (B, channels, size, size).

        Raises ValueError for another dtype or shape: features of images in the wrong range look
        plausible and are worthless.
        """
        expected = EXTRACTORS[self.name].image
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"{self.name} takes uint8 images (B, {', '.join(map(str, expected))}), "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        return self.network(to_float(images))

    def classes(self, images: Tensor) -> Tensor:
        """Class logits (B, classes) of uint8 images, for histograms of what was generated."""
        return self.network.head(self(images))


def load(name: str) -> Extractor:
    """One of the EXTRACTORS, which ship with the package, on the CPU."""
    network = SmallCNN(EXTRACTORS[name])
    network.load_state_dict(torch.load(FOLDER / f"{name}.pt", weights_only=True))
    return Extractor(name, network)
