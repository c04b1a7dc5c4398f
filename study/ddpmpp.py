"""DDPM++, the U-Net of EDM's CIFAR-10 models, under EDM's parameter names (Song et al. 2021, arXiv
2011.13456, appendix H, as in Karras et al. 2022, arXiv 2206.00364, appendix F).

Residual blocks with the noise label added between their convolutions; one-headed attention at
chosen resolutions and at the lowest; resampling inside of blocks by the filter [1, 1], which is
average pooling and nearest neighbours; skips by concatenation; sums scaled by sqrt(1/2). A
published state_dict loads by name without its prefix `model.`, less what F does not read:
`map_augment.weight`, which has no bias and whose input is zero outside of augmented training, and
the buffers `*.resample_filter`, all of them 1/4.

In half precision the path of the noise label stays in float32: neighbouring t would round to one.
Initial weights are EDM's: uniform within +-sqrt(6 / (fan_in + fan_out)), times 1e-5 in a block's
last convolution, the attention's projection and the output layers, sqrt(0.2) in q, k and v.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from study.parts import Network, Sum, activated, doubled, entered, group_norm, product

EPS = 1e-6
SCALE = math.sqrt(0.5)  # a sum of two keeps their variance
MAX_PERIOD = 10_000  # of the label's sinusoids, over 2 pi
SMALL = 1e-5
INITIAL_SCALE = {"conv1": SMALL, "proj": SMALL, "aux_conv": SMALL, "head": SMALL, "qkv": 0.2**0.5}


def sinusoids(c_noise: Tensor, width: int) -> Tensor:
    """Sinusoids (B, width) of noise labels (B,): sines first, frequencies from 1 down to 1e-4."""
    frequency = MAX_PERIOD ** -torch.linspace(0, 1, width // 2, device=c_noise.device)
    angle = c_noise[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class Linear(nn.Linear):
    """A linear layer that stays in the weights' precision under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inp) -> (..., out)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class Block(nn.Module):
    """Residual block: norm, SiLU, resampling, conv, the noise label added, norm, SiLU, conv; then
    attention, residual too. layer: of its dropout mask."""

    def __init__(
        self,
        inp: int,
        out: int,
        label: int,
        drop: float,
        layer: int,
        attention: bool = False,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.drop, self.layer, self.attention = drop, layer, attention
        self.resample = resample or nn.Identity()
        self.norm0, self.norm1 = group_norm(inp, EPS), group_norm(out, EPS)
        self.conv0 = nn.Conv2d(inp, out, 3, padding=1)
        self.conv1 = nn.Conv2d(out, out, 3, padding=1)
        self.affine = Linear(label, out)
        self.skip = nn.Conv2d(inp, out, 1) if inp != out or resample else nn.Identity()
        if attention:
            self.norm2 = group_norm(out, EPS)
            self.qkv, self.proj = nn.Conv2d(out, 3 * out, 1), nn.Conv2d(out, out, 1)

    def forward(
        self, x: Tensor | Sum, label: Tensor, key: Tensor | None, fused: bool
    ) -> tuple[Tensor, Sum]:
        """x (B, inp, H, W), label (B, label) -> x, made if it was a sum, and (B, out, H', W'), H'
        as resampled."""
        x, h = entered(self.norm0, x, fused)
        h, bias = product(self.conv0, self.resample(h), fused)
        e = self.affine(label) if bias is None else self.affine(label) + bias
        h = activated(self.norm1, h, fused, e, mask=(self.drop, key, self.layer))
        h, e = product(self.conv1, h, fused)
        skip, more = product(self.skip, self.resample(x), fused)
        result = Sum(h, skip, e if more is None else e + more, SCALE)
        if self.attention:
            skip, h = entered(self.norm2, result, fused, silu=False)
            h, e = product(self.proj, self.attended(h), fused)
            result = Sum(h, skip, e, SCALE)
        return x, result

    def attended(self, h: Tensor) -> Tensor:
        """One head of softmax attention over the pixels, (B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = h.shape
        # the channels of qkv run q, k, v, q, k, v: put in order in the weights, which are smaller
        # than the activations
        weight, bias = (
            w.unflatten(0, (C, 3)).transpose(0, 1).flatten(0, 1)
            for w in (self.qkv.weight, self.qkv.bias)
        )
        rows = F.conv2d(h, weight, bias).permute(0, 2, 3, 1).reshape(B, 1, H * W, 3 * C)
        # softmax in float32 whatever the precision, as EDM's. Under deterministic algorithms torch
        # leaves out cuDNN's kernel, and the gradients of the flash one (half precision) and of the
        # memory-efficient one (float32) add in a fixed order
        a = F.scaled_dot_product_attention(*rows.chunk(3, -1))
        return a.reshape(B, H, W, C).permute(0, 3, 1, 2)


class DdpmPP(Network):
    """EDM's DDPM++ without classes: see the module."""

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        mult: tuple[int, ...],
        blocks: int,
        attention: tuple[int, ...],
        drop: float,
        precision: str,
        head: bool,
    ) -> None:
        super().__init__(precision)
        pixels, side, _ = shape
        self.width, self.last = width, f"{side}x{side}_aux_conv"
        label, layers = 4 * width, itertools.count()
        self.map_layer0, self.map_layer1 = Linear(width, label), Linear(label, label)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        here = width

        def block(inp: int, out: int, *how: object) -> Block:
            return Block(inp, out, label, drop, next(layers), *how)

        skips = [here]
        for level, m in enumerate(mult):
            size = side >> level
            at = f"{size}x{size}"
            if level:
                self.enc[f"{at}_down"] = block(here, here, False, nn.AvgPool2d(2))
                skips.append(here)
            else:
                self.enc[f"{at}_conv"] = nn.Conv2d(pixels, here, 3, padding=1)
            for i in range(blocks):
                self.enc[f"{at}_block{i}"] = block(here, width * m, size in attention)
                here = width * m
                skips.append(here)
        for level, m in reversed(list(enumerate(mult))):
            size = side >> level
            at = f"{size}x{size}"
            if level == len(mult) - 1:
                self.dec[f"{at}_in0"] = block(here, here, True)
                self.dec[f"{at}_in1"] = block(here, here)
            else:
                self.dec[f"{at}_up"] = block(here, here, False, doubled)
            for i in range(blocks + 1):
                attends = i == blocks and size in attention
                self.dec[f"{at}_block{i}"] = block(here + skips.pop(), width * m, attends)
                here = width * m
        self.dec[f"{side}x{side}_aux_norm"] = group_norm(here, EPS)
        self.dec[self.last] = nn.Conv2d(here, pixels, 3, padding=1)
        self.head = nn.Conv2d(here, pixels, 3, padding=1) if head else None
        self.to(memory_format=torch.channels_last)

    @property
    def out(self) -> nn.Module:
        """The output layer, which stands in the decoder under EDM's name."""
        return self.dec[self.last]

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """A parameter's first value: EDM's law for weights, biases 0, norms 1."""
        if len(shape) == 1:
            return super().initial(name, shape, generator)
        layer = name.split(".")[-2].split("_", 1)[-1]  # 32x32_aux_conv -> aux_conv
        bound = math.sqrt(6 / ((shape[0] + shape[1]) * math.prod(shape[2:])))
        draw = torch.rand(shape, generator=generator) * 2 - 1
        return draw * (bound * INITIAL_SCALE.get(layer, 1.0))

    def trunk(self, x: Tensor, c_noise: Tensor, key: Tensor | None, fused: bool = False) -> Tensor:
        """x (B, C, S, S), c_noise (B,) -> (B, width, S, S), width that of the first resolution."""
        label = F.silu(self.map_layer0(sinusoids(c_noise, self.width)))
        label = F.silu(self.map_layer1(label))
        h, skips = x.contiguous(memory_format=torch.channels_last), []
        for layer in self.enc.values():
            if isinstance(layer, Block):
                made, h = layer(h, label, key, fused)
                skips.append(made)  # what the layer before gave
            else:
                h = layer(h)
        h = h.made()
        skips.append(h)
        *layers, (_, norm), _ = self.dec.items()
        for name, layer in layers:
            h = torch.cat([h.made(), skips.pop()], 1) if "block" in name else h
            _, h = layer(h, label, key, fused)
        return entered(norm, h, fused)[1]
