"""Triton kernels of `kernels`: group normalisation with what stands around it, one pass each way.

A program owns the channels of a few whole groups of one sample, K groups of D channels, and walks
over that sample's pixels P at a time. Statistics come first and the result second; a tile that
fits is held in registers between the two, a larger one is read again while caches still hold it.
Every sum has one owner and one order, so the same input gives the same bits.

x is (B, HW, C) in memory, channels last. Statistics are sums around the channel's first pixel,
which are put together by the law of total variance: nothing cancels where |mean| >> std, and what
is added to a whole channel enters its mean alone.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from study import noise

FIRST, SECOND, THIRD = (tl.constexpr(m) for m in noise.MULTIPLIERS)


class Tiling(NamedTuple):
    """K groups in S lanes, P pixels at a time, by so many warps of 32 threads with so many
    registers each at most."""

    K: int
    S: int
    P: int
    warps: int
    registers: int


def tiling(pixels: int, group: int, itemsize: int, way: str) -> Tiling:
    """The shape of a program's tile for groups of `group` channels: 64 bytes of a pixel, and as
    many pixels and numbers a thread as were fastest on an H200. way: "forward", "sum" (forward,
    with a residual sum before it) or "backward". At most 128, 1 024 and 256 pixels are held in
    registers if they are all; else they are read twice."""
    S = triton.next_power_of_2(max(64 // itemsize, group))
    whole, large = triton.next_power_of_2(pixels), pixels > 256
    at_once, numbers = {
        "forward": (256, 16) if large else (128, 32),
        "sum": (1024, 64) if large else (256, 32),
        "backward": (128, 16) if large else (256, 32),
    }[way]
    P = min(whole, at_once, max(at_once * 32 // S, 1))
    warps = min(max(P * S // numbers // 32, 1), 16)
    # two programs share a multiprocessor's 65 536 registers, unless one's tile fills them
    return Tiling(S // group, S, P, warps, min(max(1024 // warps, 2 * numbers), 255))


@triton.jit
def _place(C: tl.constexpr, D: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
    """This program's sample and channels (S,), which of them exist, and (S, S) which share a
    group."""
    slabs: tl.constexpr = (C + K * D - 1) // (K * D)
    lane, program = tl.arange(0, S), tl.program_id(0)
    c = program % slabs * (K * D) + lane
    group = lane // D
    return program // slabs, c, (lane < K * D) & (c < C), group[:, None] == group[None, :]


@triton.jit
def _across(values, same):
    """Sums over each channel's group (S,)."""
    return tl.sum(tl.where(same, values[None, :], 0.0), 1)


@triton.jit
def _channel(values, sample, row, c, real):
    """A value per channel (S,) of a (B, C) or, with row = 0, a (C,) tensor; 0 where there is
    none."""
    if values is None:
        found = tl.zeros_like(c).to(tl.float32)
    else:
        found = tl.load(values + sample * row + c, mask=real, other=0.0).to(tl.float32)
    return found


@triton.jit
def _within(first, real, HW: tl.constexpr, P: tl.constexpr):
    """Which of P pixels and S channels exist (P, S)."""
    return (first + tl.arange(0, P) < HW)[:, None] & real[None, :]


@triton.jit
def _rows(x, first, c, real, C: tl.constexpr, HW: tl.constexpr, P: tl.constexpr):
    """(P, S) of x from pixel `first` on, 0 beyond the last."""
    at = (first + tl.arange(0, P))[:, None] * C + c[None, :]
    return tl.load(x + at, mask=_within(first, real, HW, P), other=0.0)


@triton.jit
def _put(x, value, first, c, real, C: tl.constexpr, HW: tl.constexpr, P: tl.constexpr):
    at = (first + tl.arange(0, P))[:, None] * C + c[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=_within(first, real, HW, P))


@triton.jit
def _joined(
    x, skip, e, gain, first, c, real, C: tl.constexpr, HW: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """What is normalised, as it is stored: x, or (x + e + skip) gain where there is a skip."""
    tile = _rows(x, first, c, real, C, HW, P)
    if skip is not None:
        more = _rows(skip, first, c, real, C, HW, P).to(tl.float32)
        tile = ((tile.to(tl.float32) + e[None, :] + more) * gain).to(x.dtype.element_ty)
    return tile


@triton.jit
def _mask(
    key, stream, sample, first, c, C: tl.constexpr, HW: tl.constexpr, P: tl.constexpr,
    LEAST: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """(P, S) dropout's factor, the same as `noise.dropout`'s: 0 or 1 / KEPT."""
    position = (sample * C + c)[None, :] * HW + (first + tl.arange(0, P))[:, None]
    word = position.to(tl.uint32)
    word = (word ^ (word >> 16)) * FIRST
    word = word ^ tl.load(key).to(tl.uint32) ^ stream.to(tl.uint32)
    word = (word ^ (word >> 16)) * SECOND
    word = (word ^ (word >> 16)) * THIRD
    return tl.where(word >= LEAST, 1 / KEPT, 0.0)


@triton.jit(do_not_specialize=["stream"])
def forward(
    x, skip, e, w, b, scale, shift, key, y, z, mean, rstd,
    e_row, scale_row, shift_row, stream, gain, eps,
    C: tl.constexpr, D: tl.constexpr, HW: tl.constexpr, LEAST: tl.constexpr, KEPT: tl.constexpr,
    SILU: tl.constexpr, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """y and, where there is a skip, z; mean and rstd (B, C / D) of what is normalised."""
    sample, c, real, same = _place(C, D, K, S)
    base = sample.to(tl.int64) * (HW * C)
    x, y = x + base, y + base
    if skip is not None:
        skip, z = skip + base, z + base
    e = _channel(e, sample, e_row, c, real)
    tile = _joined(x, skip, e, gain, 0, c, real, C, HW, P)
    origin = tl.sum(_joined(x, skip, e, gain, 0, c, real, C, HW, 1).to(tl.float32), 0)
    later = e if skip is None else tl.zeros_like(e)  # what is not in the tile already
    total, square = tl.zeros([P, S], tl.float32), tl.zeros([P, S], tl.float32)
    for first in range(0, HW, P):
        apart = tile.to(tl.float32) - origin[None, :]
        apart = tl.where(_within(first, real, HW, P), apart, 0.0)
        total += apart
        square += apart * apart
        if skip is not None:
            _put(z, tile, first, c, real, C, HW, P)
        if P < HW:
            tile = _joined(x, skip, e, gain, first + P, c, real, C, HW, P)
    away = tl.sum(total, 0) / HW
    of_channel = origin + later + away
    m = _across(tl.where(real, of_channel, 0.0), same) / D
    apart = of_channel - m
    variance = tl.sum(square, 0) / HW - away * away + apart * apart
    variance = _across(tl.where(real, variance, 0.0), same) / D
    r = 1 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    outer = 1 + _channel(scale, sample, scale_row, c, real)
    slope = r * _channel(w, sample, 0, c, real) * outer
    offset = _channel(b, sample, 0, c, real) * outer - (m - later) * slope
    offset += _channel(shift, sample, shift_row, c, real)
    if P < HW:
        if skip is not None:
            x = z  # the sum itself is read again, not its parts
            tl.debug_barrier()  # other threads of this program may have stored it
        tile = _rows(x, 0, c, real, C, HW, P)
    for first in range(0, HW, P):
        v = tile.to(tl.float32) * slope[None, :] + offset[None, :]
        if SILU:
            v = v / (1 + tl.exp(-v))
        if key is not None:
            v *= _mask(key, stream, sample, first, c, C, HW, P, LEAST, KEPT)
        _put(y, v, first, c, real, C, HW, P)
        if P < HW:
            tile = _rows(x, first + P, c, real, C, HW, P)
    at, one = sample * (C // D) + c // D, real & (c % D == 0)
    tl.store(mean + at, m, mask=one)
    tl.store(rstd + at, r, mask=one)


@triton.jit(do_not_specialize=["stream"])
def backward(
    x, dy, dz, e, w, b, scale, shift, key, mean, rstd, dx, sums, moments, totals,
    e_row, scale_row, shift_row, stream, gain,
    C: tl.constexpr, D: tl.constexpr, HW: tl.constexpr, LEAST: tl.constexpr, KEPT: tl.constexpr,
    SILU: tl.constexpr, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """dx, and per sample and channel (B, C) the sums over pixels of dv, of dv times the normalised
    x and, where asked for, of dx; v is what silu is applied to."""
    sample, c, real, same = _place(C, D, K, S)
    base = sample.to(tl.int64) * (HW * C)
    x, dy, dx = x + base, dy + base, dx + base
    if dz is not None:
        dz += base
    at = sample * (C // D) + c // D
    r = tl.load(rstd + at, mask=real, other=0.0)
    m = tl.load(mean + at, mask=real, other=0.0) - _channel(e, sample, e_row, c, real)
    outer = 1 + _channel(scale, sample, scale_row, c, real)
    slope = r * _channel(w, sample, 0, c, real) * outer
    offset = _channel(b, sample, 0, c, real) * outer - m * slope
    offset += _channel(shift, sample, shift_row, c, real)
    tile, upstream = _rows(x, 0, c, real, C, HW, P), _rows(dy, 0, c, real, C, HW, P)
    total, moment = tl.zeros([P, S], tl.float32), tl.zeros([P, S], tl.float32)
    for first in range(0, HW, P):
        t = tile.to(tl.float32)
        dv = _through(t, upstream, slope, offset, SILU)
        if key is not None:
            dv *= _mask(key, stream, sample, first, c, C, HW, P, LEAST, KEPT)
        total += dv
        moment += dv * t
        if P < HW:
            tile = _rows(x, first + P, c, real, C, HW, P)
            upstream = _rows(dy, first + P, c, real, C, HW, P)
    summed = tl.sum(total, 0)
    moved = (tl.sum(moment, 0) - m * summed) * r
    # dx = (dv slope - level - normal tilt) r, gathered by powers of x
    tilt = -_across(slope * moved, same) * r / (D * HW)
    level = -_across(slope * summed, same) / (D * HW) - m * tilt
    whole = tl.zeros([P, S], tl.float32)
    if P < HW:
        tile, upstream = _rows(x, 0, c, real, C, HW, P), _rows(dy, 0, c, real, C, HW, P)
    for first in range(0, HW, P):
        t = tile.to(tl.float32)
        dv = _through(t, upstream, slope, offset, SILU)
        if key is not None:
            dv *= _mask(key, stream, sample, first, c, C, HW, P, LEAST, KEPT)
        d = dv * slope[None, :] + (t * tilt[None, :] + level[None, :])
        if dz is not None:
            d += _rows(dz, first, c, real, C, HW, P).to(tl.float32)
        d *= gain
        _put(dx, d, first, c, real, C, HW, P)
        if totals is not None:
            whole += tl.where(_within(first, real, HW, P), d, 0.0)
        if P < HW:
            tile = _rows(x, first + P, c, real, C, HW, P)
            upstream = _rows(dy, first + P, c, real, C, HW, P)
    at = sample * C + c
    tl.store(sums + at, summed, mask=real)
    tl.store(moments + at, moved, mask=real)
    if totals is not None:
        tl.store(totals + at, tl.sum(whole, 0), mask=real)


@triton.jit
def _through(t, upstream, slope, offset, SILU: tl.constexpr):
    """The gradient (P, S) at v = t slope + offset of what reaches silu(v), or v itself."""
    dv = upstream.to(tl.float32)
    if SILU:
        v = t * slope[None, :] + offset[None, :]
        share = 1 / (1 + tl.exp(-v))
        dv *= share * (1 + v * (1 - share))
    return dv
