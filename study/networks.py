"""The networks F(x, c_noise) by their factor: an MLP for vectors, U-Nets for square images.

MLP and small U-Net stand here, their output layers starting at zero; EDM's DDPM++ in `ddpmpp`,
what they share in `parts`.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from study import seeds, subjects
from study.ddpmpp import DdpmPP
from study.errors import StudyError
from study.meaning import misfit
from study.noise import dropout
from study.parts import Network, Sum, activated, doubled, embed, entered, group_norm, product

MAX_CHANNELS_FACTOR = 2  # channels double once below the first resolution


class Mlp(Network):
    """Residual multilayer perceptron; images are flattened."""

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        depth: int,
        drop: float,
        precision: str,
        head: bool,
    ) -> None:
        super().__init__(precision)
        size = math.prod(shape)
        self.drop, self.width = drop, width
        self.inp = nn.Linear(size, width)
        self.time = nn.ModuleList(nn.Linear(64, width) for _ in range(depth))
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, size)
        self.head = nn.Linear(width, size) if head else None

    def trunk(self, x: Tensor, c_noise: Tensor, key: Tensor | None, fused: bool = False) -> Tensor:
        """x (B, ...), c_noise (B,) -> (B, width)."""
        label = embed(c_noise, 64)
        h = self.inp(x.flatten(1))  # (B, width)
        for i, (time, hidden) in enumerate(zip(self.time, self.hidden, strict=True)):
            h = h + dropout(F.silu(hidden(F.silu(h + time(label)))), self.drop, key, i)
        return F.silu(h)


class Block(nn.Module):
    """Residual block: norm, SiLU, conv, shifted and scaled by the noise label, norm, SiLU,
    conv."""

    def __init__(self, inp: int, out: int, label: int, drop: float, layer: int) -> None:
        super().__init__()
        self.drop, self.layer = drop, layer
        self.norm0, self.norm1 = group_norm(inp), group_norm(out)
        self.conv0 = nn.Conv2d(inp, out, 3, padding=1)
        self.conv1 = nn.Conv2d(out, out, 3, padding=1)
        self.label = nn.Linear(label, 2 * out)
        self.skip = nn.Conv2d(inp, out, 1) if inp != out else nn.Identity()

    def forward(self, x: Tensor | Sum, label: Tensor, key: Tensor | None, fused: bool) -> Sum:
        """x (B, inp, H, W), label (B, label) -> (B, out, H, W)."""
        x, h = entered(self.norm0, x, fused)
        h, e = product(self.conv0, h, fused)
        scale, shift = self.label(label).chunk(2, 1)
        mask = self.drop, key, self.layer
        h = activated(self.norm1, h, fused, e, scale, shift, mask)
        h, e = product(self.conv1, h, fused)
        skip, more = product(self.skip, x, fused)
        return Sum(h, skip, e if more is None else e + more)


class Unet(Network):
    """A small U-Net without attention: average pooling down, nearest-neighbour up, skips added in
    by concatenation. Odd sizes are rounded up on the way down and cropped on the way up."""

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        levels: int,
        blocks: int,
        patch: int,
        drop: float,
        precision: str,
        head: bool,
    ) -> None:
        super().__init__(precision)
        pixels = shape[0] * patch**2
        self.patch = patch
        label = 4 * width
        channels = [width * min(2**i, MAX_CHANNELS_FACTOR) for i in range(levels)]
        self.width = width
        self.time = nn.Linear(2 * width, label)
        self.inp = nn.Conv2d(pixels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        here, skips, layer = width, [], 0
        for c in channels:
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(Block(here, c, label, drop, layer))
                here, layer = c, layer + 1
            self.down.append(stage)
            skips.append(c)
        for c in reversed(channels):
            stage, here = nn.ModuleList(), here + skips.pop()
            for _ in range(blocks):
                stage.append(Block(here, c, label, drop, layer))
                here, layer = c, layer + 1
            self.up.append(stage)
        self.norm, self.out = group_norm(here), nn.Conv2d(here, pixels, 3, padding=1)
        self.head = nn.Conv2d(here, pixels, 3, padding=1) if head else None
        self.to(memory_format=torch.channels_last)

    def shaped(self, y: Tensor) -> Tensor:
        """Channels back to pixels, (B, C, S, S)."""
        return F.pixel_shuffle(y, self.patch)

    def trunk(self, x: Tensor, c_noise: Tensor, key: Tensor | None, fused: bool = False) -> Tensor:
        """x (B, C, S, S), c_noise (B,) -> (B, width, S, S)."""
        label = F.silu(self.time(embed(c_noise, 2 * self.width)))
        x = F.pixel_unshuffle(x, self.patch)
        h = self.inp(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for i, stage in enumerate(self.down):
            if i:
                h = F.avg_pool2d(h, 2, ceil_mode=True)
            for block in stage:
                h = block(h, label, key, fused)
            h = h.made()
            skips.append(h)
        for i, stage in enumerate(self.up):
            h, skip = h.made() if i else h, skips.pop()
            if h.shape[-1] != skip.shape[-1]:
                h = doubled(h)[..., : skip.shape[-2], : skip.shape[-1]]
            h = torch.cat([h, skip], 1)
            for block in stage:
                h = block(h, label, key, fused)
        return entered(self.norm, h, fused)[1]


def build(
    network: subjects.Network,
    shape: tuple[int, ...],
    drop: float,
    seed: int,
    role: str,
    precision: str = "float32",
    head: bool = False,
) -> Network:
    """The network on the CPU, its weights addressed by (seed, role, parameter name); head: with a
    second output layer, for an auxiliary loss. Raises StudyError for images it can't take."""
    net = made(network, shape, drop, precision, head)
    for name, weight in net.named_parameters():
        generator = torch.Generator().manual_seed(seeds.number(seed, role, "init", name))
        weight.data.copy_(net.initial(name, weight.shape, generator))
    return net


def made(
    network: subjects.Network, shape: tuple[int, ...], drop: float, precision: str, head: bool
) -> Network:
    """The network with whatever weights torch gives it; on torch's device `meta` with none, so
    that their shapes are known at no expense. Raises StudyError as `build`."""
    if len(shape) == 3 and (why := misfit(network, shape[-1])):
        raise StudyError(f"network: {why}")
    match network:
        case subjects.Mlp(width=width, depth=depth):
            return Mlp(shape, width, depth, drop, precision, head)
        case subjects.Unet(width=width, levels=levels, blocks=blocks, patch=patch):
            return Unet(shape, width, levels, blocks, patch, drop, precision, head)
        case subjects.DdpmPP(width=width, mult=mult, blocks=blocks, attention=attention):
            return DdpmPP(shape, width, mult, blocks, attention, drop, precision, head)
        case _:
            assert_never(network)
