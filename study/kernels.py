"""Group normalisation, its affine maps, SiLU and dropout as one pass over memory each way.

    y = dropout(silu((GN(x + e) w + b) (1 + scale) + shift)),    GN over groups of channels,
    z = (x + e + skip) gain,   y = silu(GN(z) w + b)             where a residual sum comes first,

and either without silu, which is then the identity.

x is (B, C, H, W), channels last; e (C,) or (B, C) is what the layer before adds to whole channels
(a convolution's bias, an embedding), scale and shift are (B, C). Statistics and arithmetic are in
float32, and what is stored has x's type. Per pixel dx = slope dv + tilt x + level with dv the
gradient at silu's argument; gradients of what is per channel follow from the sums over pixels of
dv, dv GN(x + e) and dx, which are added in one fixed order.

`fused` asks for the GPU's kernels (`tiles`), which know first derivatives in backward mode only;
without it the same is composed of torch's functions, for any device and any derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd import forward_ad

from study.noise import dropout, salt


def norm_silu(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    e: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    p: float = 0.0,
    key: Tensor | None = None,
    layer: int = 0,
    silu: bool = True,
    fused: bool = False,
) -> Tensor:
    """dropout(silu((GN(x + e) w + b) (1 + scale) + shift)) (B, C, H, W), or without silu.

    w, b (C,); e (C,) or (B, C); scale and shift (B, C), both or neither; dropout of share p by
    (key, layer), none without a key. Fused: y has x's type; else torch's rules of promotion hold.
    """
    assert (scale is None) == (shift is None), "scale and shift come together"
    if fused:
        around = e, w, b, scale, shift, key if p else None
        numbers = groups, eps, 1.0, p, layer, silu
        return torch.ops.study.norm_silu(_last(x), None, *around, *numbers)[0]
    h = _normed(x if e is None else x + _spread(e), w, b, groups, eps)
    if scale is not None:
        h = torch.addcmul(_spread(shift), h, _spread(scale) + 1)
    h = F.silu(h) if silu else h
    return dropout(h, p, key, layer) if p else h


def add_norm_silu(
    x: Tensor,
    skip: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    e: Tensor | None = None,
    gain: float = 1.0,
    silu: bool = True,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """z = (x + e + skip) gain and silu(GN(z) w + b) or GN(z) w + b, (B, C, H, W) each. w, b (C,);
    e (C,) or (B, C)."""
    if fused:
        x, skip = _last(x), _last(skip.to(x.dtype))
        around = e, w, b, None, None, None
        y, z, *_ = torch.ops.study.norm_silu(x, skip, *around, groups, eps, gain, 0.0, 0, silu)
        return z, y
    z = x if e is None else x + _spread(e)
    z = (z + skip) * gain if gain != 1 else z + skip
    y = _normed(z, w, b, groups, eps)
    return z, F.silu(y) if silu else y


def _normed(x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float) -> Tensor:
    """GN(x) w + b by torch, whose older versions (2.11) derive it in forward mode only where
    channels come first."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        x = x.contiguous()
    return F.group_norm(x, groups, w, b, eps)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _spread(value: Tensor) -> Tensor:
    """(C,) or (B, C) over all pixels."""
    return value[..., None, None]


def _row(value: Tensor | None) -> int:
    """Elements from one sample's values to the next one's; 0 where all share them."""
    assert value is None or value.stride(-1) == 1, "channels lie one after another"
    return 0 if value is None or value.ndim == 1 else value.stride(0)


def _launch(
    x: Tensor, groups: int, way: str, p: float, layer: int, silu: bool
) -> tuple[tuple, int, dict]:
    """The grid, the dropout stream as a signed word, and the kernel's constants."""
    from study import tiles  # Triton is for those who have a GPU

    B, C, H, W = x.shape
    assert C % groups == 0 and x.is_contiguous(memory_format=torch.channels_last)
    assert x.numel() < 2**32, "positions are 32-bit words"
    assert x.dtype != torch.float64, "arithmetic is in float32"
    D = C // groups
    t = tiles.tiling(H * W, D, x.element_size(), way)
    constants = {"C": C, "D": D, "HW": H * W, "LEAST": int(p * 2**32), "KEPT": 1 - p}
    constants |= {"SILU": silu, "K": t.K, "S": t.S, "P": t.P}
    constants |= {"num_warps": t.warps, "maxnreg": t.registers}
    word = salt(layer)
    return (B * -(-groups // t.K),), word - 2**32 * (word >> 31), constants


@library.custom_op(
    "study::norm_silu",
    mutates_args=(),
    schema="(Tensor x, Tensor? skip, Tensor? e, Tensor w, Tensor b, Tensor? scale, Tensor? shift, "
    "Tensor? key, int groups, float eps, float gain, float p, int layer, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    skip: Tensor | None,
    e: Tensor | None,
    w: Tensor,
    b: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    key: Tensor | None,
    groups: int,
    eps: float,
    gain: float,
    p: float,
    layer: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, z (empty where there is no skip), mean and rstd (B, groups)."""
    from study import tiles

    way = "forward" if skip is None else "sum"
    grid, stream, constants = _launch(x, groups, way, p, layer, silu)
    y, z, mean, rstd = _outputs(x, skip, groups)
    rows = _row(e), _row(scale), _row(shift)
    tensors = x, skip, e, w, b, scale, shift, key, y, z, mean, rstd
    tiles.forward[grid](*tensors, *rows, stream, gain, eps, **constants)
    return y, z, mean, rstd


def _outputs(x: Tensor, skip: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, statistics = torch.empty_like(x), (x.shape[0], groups)
    z = x.new_empty(0) if skip is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(statistics, dtype=torch.float32) for _ in range(2))
    return y, z, mean, rstd


@_forward.register_fake
def _(x: Tensor, skip: Tensor | None, *args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    return _outputs(x, skip, args[6])


@library.custom_op(
    "study::norm_silu_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor dy, Tensor? dz, Tensor? e, Tensor w, Tensor b, Tensor? scale, "
    "Tensor? shift, Tensor? key, Tensor mean, Tensor rstd, bool totalled, float gain, float p, "
    "int layer, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    x: Tensor,
    dy: Tensor,
    dz: Tensor | None,
    e: Tensor | None,
    w: Tensor,
    b: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    key: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    totalled: bool,
    gain: float,
    p: float,
    layer: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, and per sample and channel (B, C) the sums of dv, of dv GN(x + e) and, where `totalled`,
    of dx."""
    from study import tiles

    grid, stream, constants = _launch(x, mean.shape[1], "backward", p, layer, silu)
    dx, sums, moments, totals = _gradients(x, totalled)
    rows = _row(e), _row(scale), _row(shift)
    made = dx, sums, moments, totals if totalled else None
    tensors = x, dy, dz, e, w, b, scale, shift, key, mean, rstd, *made
    tiles.backward[grid](*tensors, *rows, stream, gain, **constants)
    return dx, sums, moments, totals


def _gradients(x: Tensor, totalled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = x.shape[:2], x.shape[:2], x.shape[:2] if totalled else (0,)
    return torch.empty_like(x), *(x.new_empty(s, dtype=torch.float32) for s in shapes)


@_backward.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    return _gradients(x, args[10])


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    x, skip, e, w, b, scale, shift, key, _, _, *ctx.numbers = inputs
    _, z, mean, rstd = output
    ctx.skips = skip is not None
    normalised = (x, e) if skip is None else (z, None)
    ctx.save_for_backward(*normalised, e, w, b, scale, shift, key, mean, rstd)
    ctx.set_materialize_grads(False)


def _pull(ctx: Any, dy: Tensor | None, dz: Tensor | None, *_: None) -> tuple:  # noqa: ANN401
    x, inner, e, w, b, scale, shift, key, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else _last(dy)
    dz = _last(dz) if ctx.skips and dz is not None else None
    dx, sums, moments, totals = torch.ops.study.norm_silu_backward(
        x, dy, dz, inner, w, b, scale, shift, key, mean, rstd, e is not None, *ctx.numbers
    )
    outer = 1 if scale is None else 1 + scale.float()
    dw, db = (outer * moments).sum(0).to(w.dtype), (outer * sums).sum(0).to(b.dtype)
    de = None if e is None else (totals.sum(0) if e.ndim == 1 else totals).to(e.dtype)
    dscale = None if scale is None else (w * moments + b * sums).to(scale.dtype)
    dshift = None if shift is None else sums.to(shift.dtype)
    return dx, dx if ctx.skips else None, de, dw, db, dscale, dshift, *(None,) * 7


_forward.register_autograd(_pull, setup_context=_keep)
