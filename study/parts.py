"""What the networks are made of: the base class, labels, dropout masks, norms and resampling.

A network F takes the scaled input c_in x_t and the noise label c_noise = ln(t) / 4 (Karras et al.
2022) and returns a tensor of x's shape; the preconditioning that makes a denoiser or a consistency
model of F stands in `consistency`. Dropout masks are a pure function of an explicit key, so that
student and target share them and a compiled step stays pure. Under bfloat16 products are rounded;
weights and what is outside of F stay float32. The norms are in float32 where torch's autocast puts
them there: on CUDA, not on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from study import noise


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

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """A parameter's first value: weights ~ N(0, 1 / fan_in), biases 0, norms 1, the output
        layers 0."""
        if len(shape) == 1:
            return torch.full(shape, float("norm" in name and name.endswith("weight")))
        if name.startswith(("out.", "head.")):
            return torch.zeros(shape)
        draw = torch.randn(shape, generator=generator)
        return draw / math.sqrt(math.prod(shape[1:]))

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


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """Equal groups of at least four channels, as many as that allows, 32 at most."""
    groups = max(n for n in range(1, min(32, channels // 4) + 1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps)


def doubled(h: Tensor) -> Tensor:
    """Nearest-neighbour upsampling (B, C, H, W) -> (B, C, 2 H, 2 W). As a copy: on a GPU the
    deterministic gradient of `interpolate` costs as much as a quarter of the step."""
    B, C, H, W = h.shape
    rows = h.permute(0, 2, 3, 1)[:, :, None, :, None]  # channels last, as they lie in memory
    return rows.expand(B, H, 2, W, 2, C).reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
