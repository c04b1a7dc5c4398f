"""What the networks are made of: the base class, labels, norms and resampling.

A network F takes the scaled input c_in x_t and the noise label c_noise = ln(t) / 4 (Karras et al.
2022) and returns a tensor of x's shape; the preconditioning that makes a denoiser or a consistency
model of F stands in `consistency`. Dropout masks (`noise.dropout`) are a pure function of an
explicit key, so that student and target share them and a compiled step stays pure. In half
precision products are rounded; weights and what is outside of F stay float32. The norms are in
float32 where torch's autocast puts them there: on CUDA, not on a CPU.

On CUDA a norm is one kernel with what stands around it, a residual sum and the biases of the
convolutions before it included; `body` composes the same of torch's functions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from study import kernels
from study.convolution import convolved


def embed(c_noise: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) of noise labels (B,), frequencies 1/2 to 32 per unit."""
    frequency = 2.0 ** torch.linspace(-1, 5, width // 2, device=c_noise.device)
    angle = c_noise[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


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

    def trunk(self, x: Tensor, c_noise: Tensor, key: Tensor | None, fused: bool = False) -> Tensor:
        """What the output layers read of x (B, ...) and c_noise (B,). fused: by `kernels`, which
        are for a GPU and know first derivatives in backward mode only."""
        raise NotImplementedError

    def body(self, x: Tensor, c_noise: Tensor, key: Tensor | None) -> Tensor:
        """F of x (B, ...) and c_noise (B,), in x's shape or flattened, for any derivative."""
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
            h = self.trunk(x, c_noise, key, fused=x.is_cuda)
            layers = (self.out, self.head) if both else (self.out,)
            outputs = [self.shaped(layer(h)) for layer in layers]
        F_x, *more = (y.float().view(x.shape) for y in outputs)
        return (F_x, *more) if both else F_x


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """Equal groups of at least four channels, as many as that allows, 32 at most."""
    groups = max(n for n in range(1, min(32, channels // 4) + 1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps)


def activated(
    norm: nn.GroupNorm,
    h: Tensor,
    fused: bool,
    e: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mask: tuple[float, Tensor | None, int] = (0.0, None, 0),
) -> Tensor:
    """SiLU of the norm of h (B, C, H, W); the rest as in `kernels.norm_silu`, mask its (p, key,
    layer)."""
    weights = norm.weight, norm.bias, norm.num_groups, norm.eps
    return kernels.norm_silu(h, *weights, e, scale, shift, *mask, fused=fused)


def product(layer: nn.Module, h: Tensor, fused: bool) -> tuple[Tensor, Tensor | None]:
    """layer(h); fused: of a convolution without its bias (C,), which is left to the next norm."""
    if fused and isinstance(layer, nn.Conv2d):
        return convolved(h, layer), layer.bias
    return layer(h), None


class Sum(NamedTuple):
    """(h + e + skip) gain, (B, C, H, W) each but the bias e (C,), left to the norm that reads
    it."""

    h: Tensor
    skip: Tensor
    e: Tensor | None
    gain: float = 1.0

    def made(self) -> Tensor:
        """The sum, rounded once."""
        h = self.h if self.e is None else self.h + self.e[:, None, None]
        z = (h + self.skip) * self.gain if self.gain != 1 else h + self.skip
        return z.to(self.h.dtype)


def entered(
    norm: nn.GroupNorm, x: Tensor | Sum, fused: bool, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """x, made if it is a sum, and SiLU of its norm, or its norm."""
    weights = norm.weight, norm.bias, norm.num_groups, norm.eps
    if not isinstance(x, Sum):
        return x, kernels.norm_silu(x, *weights, silu=silu, fused=fused)
    return kernels.add_norm_silu(x.h, x.skip, *weights, x.e, x.gain, silu, fused)


def doubled(h: Tensor) -> Tensor:
    """Nearest-neighbour upsampling (B, C, H, W) -> (B, C, 2 H, 2 W). As a copy: on a GPU the
    deterministic gradient of `interpolate` costs as much as a quarter of the step."""
    B, C, H, W = h.shape
    rows = h.permute(0, 2, 3, 1)[:, :, None, :, None]  # channels last, as they lie in memory
    return rows.expand(B, H, 2, W, 2, C).reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
