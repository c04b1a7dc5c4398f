"""The networks F(x, c_noise): an MLP for vectors and a U-Net for square images.

Both take the scaled input c_in x_t and the noise label c_noise = ln(t) / 4 (Karras et al. 2022)
and return a tensor of x's shape; the preconditioning that makes a denoiser or a consistency model
of F stands in `consistency`. The output layer starts at zero. Dropout masks are a pure function of
an explicit key, so that student and target share them and a compiled step stays pure. Under
bfloat16 products are rounded; weights and what is outside of F stay float32. The norms are in
float32 where torch's autocast puts them there: on CUDA, not on a CPU.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from study import factors, noise, seeds
from study.errors import StudyError

MAX_CHANNELS_FACTOR = 2  # channels double once below the first resolution


def embed(c_noise: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) of noise labels (B,), frequencies 1/2 to 32 per unit."""
    frequency = 2.0 ** torch.linspace(-1, 5, width // 2, device=c_noise.device)
    angle = c_noise[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


def dropout(h: Tensor, p: float, key: Tensor | None, layer: int) -> Tensor:
    """Inverted dropout whose mask is a hash of (key, layer, position); no key, no dropout.

    key: int64 scalar below 2^31.
    """
    if key is None or p == 0:
        return h
    word = noise.words(key, layer, h.shape)
    return h * (word >= int(p * 2**32)) / (1 - p)


class Network(nn.Module):
    """F, computed under autocast to `precision`."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.dtype = getattr(torch, precision)

    def trunk(self, x: Tensor, c_noise: Tensor, key: Tensor | None) -> Tensor:
        """What the output layers read of x (B, ...) and c_noise (B,)."""
        raise NotImplementedError

    def body(self, x: Tensor, c_noise: Tensor, key: Tensor | None) -> Tensor:
        """F of x (B, ...) and c_noise (B,), in x's shape or flattened."""
        return self.shaped(self.out(self.trunk(x, c_noise, key)))

    def shaped(self, y: Tensor) -> Tensor:
        """An output layer's values in the order of x's."""
        return y

    def forward(
        self, x: Tensor, c_noise: Tensor, key: Tensor | None = None, both: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, ...), c_noise (B,) -> F (B, ...), float32; with `both` F and the second head's."""
        half = self.dtype != torch.float32
        # no cache: a captured step would read casts that were made outside of it
        with torch.autocast(x.device.type, self.dtype, enabled=half, cache_enabled=False):
            h = self.trunk(x, c_noise, key)
            layers = (self.out, self.head) if both else (self.out,)
            outputs = [self.shaped(layer(h)) for layer in layers]
        F_x, *more = (y.float().view(x.shape) for y in outputs)
        return (F_x, *more) if both else F_x


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

    def trunk(self, x: Tensor, c_noise: Tensor, key: Tensor | None) -> Tensor:
        """x (B, ...), c_noise (B,) -> (B, width)."""
        label = embed(c_noise, 64)
        h = self.inp(x.flatten(1))  # (B, width)
        for i, (time, hidden) in enumerate(zip(self.time, self.hidden, strict=True)):
            h = h + dropout(F.silu(hidden(F.silu(h + time(label)))), self.drop, key, i)
        return F.silu(h)


def group_norm(channels: int) -> nn.GroupNorm:
    """Equal groups of at least four channels, as many as that allows, 32 at most."""
    groups = max(n for n in range(1, min(32, channels // 4) + 1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


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

    def forward(self, x: Tensor, label: Tensor, key: Tensor | None) -> Tensor:
        """x (B, inp, H, W), label (B, label) -> (B, out, H, W)."""
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.label(label)[:, :, None, None].chunk(2, 1)
        h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        return self.skip(x) + self.conv1(dropout(h, self.drop, key, self.layer))


def doubled(h: Tensor) -> Tensor:
    """Nearest-neighbour upsampling (B, C, H, W) -> (B, C, 2 H, 2 W). As a copy: on a GPU the
    deterministic gradient of `interpolate` costs as much as a quarter of the step."""
    B, C, H, W = h.shape
    rows = h.permute(0, 2, 3, 1)[:, :, None, :, None]  # channels last, as they lie in memory
    return rows.expand(B, H, 2, W, 2, C).reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)


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
        if shape[1] % patch:
            raise StudyError(f"network.patch: {patch} does not divide {shape[1]} pixels a side")
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

    def trunk(self, x: Tensor, c_noise: Tensor, key: Tensor | None) -> Tensor:
        """x (B, C, S, S), c_noise (B,) -> (B, width, S, S)."""
        label = F.silu(self.time(embed(c_noise, 2 * self.width)))
        x = F.pixel_unshuffle(x, self.patch)
        h = self.inp(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for i, stage in enumerate(self.down):
            if i:
                h = F.avg_pool2d(h, 2, ceil_mode=True)
            for block in stage:
                h = block(h, label, key)
            skips.append(h)
        for stage in self.up:
            skip = skips.pop()
            if h.shape[-1] != skip.shape[-1]:
                h = doubled(h)[..., : skip.shape[-2], : skip.shape[-1]]
            h = torch.cat([h, skip], 1)
            for block in stage:
                h = block(h, label, key)
        return F.silu(self.norm(h))


def build(
    network: factors.Network,
    shape: tuple[int, ...],
    drop: float,
    seed: int,
    role: str,
    precision: str = "float32",
    head: bool = False,
) -> Network:
    """The network on the CPU, its weights addressed by (seed, role, parameter name); head: with a
    second output layer, for an auxiliary loss.

    Weights ~ N(0, 1 / fan_in), biases 0, norms 1, the output layers 0.
    """
    match network:
        case factors.Mlp(width=width, depth=depth):
            net: Network = Mlp(shape, width, depth, drop, precision, head)
        case factors.Unet(width=width, levels=levels, blocks=blocks, patch=patch):
            net = Unet(shape, width, levels, blocks, patch, drop, precision, head)
        case _:
            assert_never(network)
    for name, weight in net.named_parameters():
        if weight.ndim == 1:
            weight.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif name.startswith(("out.", "head.")):
            weight.data.zero_()
        else:
            generator = torch.Generator().manual_seed(seeds.number(seed, role, "init", name))
            draw = torch.randn(weight.shape, generator=generator)
            weight.data.copy_(draw / math.sqrt(math.prod(weight.shape[1:])))
    return net
