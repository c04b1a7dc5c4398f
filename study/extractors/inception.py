"""InceptionV3 as published FIDs use it: the 2048 pool features, by torch-fidelity's own network.

`inception-v3-compat` is TensorFlow's network of 2015-12-05 with its way of resizing to 299 x 299
(Heusel et al. 2017, arXiv 1706.08500), which images of any size go through; grey ones are repeated
to three channels. Its 1 008 classes are ImageNet's, so samples get no histogram of classes from
it. The weights are the user's file, or the published one in torch hub's cache folder, downloaded
there once; either is read as data and never executed.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    BasicConv2d,
    FeatureExtractorInceptionV3,
)

from study.errors import StudyError
from study.extractors.names import DIGITS, INCEPTION, PUBLISHED, digest_of
from study.weights import load_tensors

FEATURES = 2048
ON_CPU = 64  # images per pass there, some 0.5 GB


class Folded(nn.Module):
    """A convolution with the batch norm after it folded into its weights, and ReLU: on a GPU one
    kernel for three, which is a tenth of the time."""

    def __init__(self, block: BasicConv2d) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(block.conv, block.bn)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, out, H', W')."""
        if not x.is_cuda:
            return self.conv(x).relu_()
        c = self.conv
        settings = c.stride, c.padding, c.dilation, c.groups
        return torch.cudnn_convolution_relu(x, c.weight, c.bias, *settings)


def fold(network: nn.Module) -> None:
    """Folds all batch norms of the network into its convolutions."""
    for name, child in network.named_children():
        if isinstance(child, BasicConv2d):
            setattr(network, name, Folded(child))
        else:
            fold(child)


class Inception(nn.Module):
    """InceptionV3 in eval mode that takes uint8 images; `digest` names its weights."""

    def __init__(self, network: FeatureExtractorInceptionV3, digest: str) -> None:
        super().__init__()
        self.name, self.digest, self.network = INCEPTION, digest, network
        fold(network)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048), float32, of uint8 images (B, 1 or 3, H, W).

        Raises ValueError for another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"{self.name} takes uint8 images (B, 1 or 3, H, W), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        parts = images.split(len(images) if images.is_cuda else ON_CPU)
        return torch.cat([self.network(part.expand(-1, 3, -1, -1))[0] for part in parts])


def weights_file(weights: str | None) -> Path:
    """The user's file, or the published one, downloaded where torch hub's cache lacks it.

    Raises StudyError, saying where to put the file, where it cannot be had.
    """
    if weights is not None:
        return Path(weights)
    path = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2])
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():  # written whole, and only with this digest
                torch.hub.download_url_to_file(
                    URL_INCEPTION_V3, str(path), hash_prefix=PUBLISHED, progress=False
                )
    except (OSError, RuntimeError, HTTPException) as error:
        raise StudyError(
            f"{URL_INCEPTION_V3}: the download failed: {error}. Put the file there yourself, as "
            f"{path}, or say where it lies with measure.fid.weights"
        ) from None
    return path


def checked_file(identity: str, weights: str | None) -> Path:
    """The file of weights, found to be the one that NAME:DIGEST means. Raises StudyError."""
    path, (_, _, wanted) = weights_file(weights), identity.partition(":")
    try:
        found = digest_of(path)
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}") from None
    if found != wanted:
        raise StudyError(
            f"{path}: the first {DIGITS} digits of its SHA-256 are {found}; {wanted} expected"
        )
    return path


def load(identity: str, weights: str | None = None) -> Inception:
    """InceptionV3 on the CPU, by NAME:DIGEST. weights: a file of torch-fidelity's state dict;
    null: the published one.

    Raises StudyError for a file that is missing, torn, not what NAME:DIGEST means, no state dict
    of this network, or that would execute code.
    """
    path = checked_file(identity, weights)
    state = load_tensors(path)
    named = isinstance(state, Mapping) and all(isinstance(k, str) for k in state)
    if not named or not all(isinstance(v, Tensor) for v in state.values()):
        raise StudyError(f"{path}: holds no state dict; tensors by name expected")
    # torch-fidelity would unpickle the file; it gets these tensors in one that was written here.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    buffer.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # it is initialised at random first
            network = FeatureExtractorInceptionV3(
                INCEPTION, [str(FEATURES)], feature_extractor_weights_path=buffer
            )
    except RuntimeError as error:
        told = textwrap.shorten(" ".join(str(error).split()), 400)
        raise StudyError(f"{path}: not torch-fidelity's InceptionV3: {told}") from None
    return Inception(network, identity.partition(":")[2])
