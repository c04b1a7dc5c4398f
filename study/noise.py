"""Random numbers inside the step: a pure function of a key, so that a compiled or captured step
draws afresh whenever its key is filled anew, and the same key gives the same numbers.

A number is a 32-bit finaliser (xor-shift, multiply, three rounds) of its position, into which key
and stream enter after the first round: added to the position, they would only shift one and the
same sequence. Positions count from `start`, so that a tensor made in pieces is the same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0x7FEB352D, 0x45D9F3B, 0x31848BAB)  # of the three rounds


def words(key: Tensor, stream: int, shape: Sequence[int], start: int = 0) -> Tensor:
    """Hashed 32-bit words (shape), int64. key: int64 scalar below 2^31, on the wanted device."""
    count = torch.Size(shape).numel()
    position = torch.arange(start, start + count, device=key.device).view(*shape)
    first, *rounds = MULTIPLIERS
    word = _mixed(position, first) ^ key ^ salt(stream)
    for multiplier in rounds:
        word = _mixed(word, multiplier)
    return word


def salt(stream: int) -> int:
    """What tells a stream's numbers from another's, a 32-bit word."""
    return stream * 0x9E3779B1 & WORD


def dropout(h: Tensor, p: float, key: Tensor | None, layer: int) -> Tensor:
    """Inverted dropout whose mask is a hash of (key, layer, position); no key, no dropout.

    key: int64 scalar below 2^31.
    """
    if key is None or p == 0:
        return h
    word = words(key, layer, h.shape)
    return h * (word >= int(p * 2**32)) / (1 - p)


def _mixed(word: Tensor, multiplier: int) -> Tensor:
    """One round of the hash. Multipliers stay below 2^31: the product then fits in int64."""
    return ((word ^ (word >> 16)) * multiplier) & WORD


def exponential(key: Tensor, stream: int, shape: Sequence[int], start: int = 0) -> Tensor:
    """Standard exponential numbers, float32, finely resolved near 0: the least of E_i / w_i over i
    is at i with probability w_i / sum w, which draws from a discrete law without a cumulated
    sum."""
    share = (words(key, stream, shape, start).float() + 0.5) / 2**32
    return -torch.log1p(-share.clamp(max=1 - 2**-24))


def uniform(key: Tensor, stream: int, shape: Sequence[int], start: int = 0) -> Tensor:
    """Uniform numbers in (0, 1), float32, of 23 bits: never 0 nor 1."""
    return ((words(key, stream, shape, start) >> 9).float() + 0.5) / 2**23


def normal(key: Tensor, stream: int, shape: Sequence[int], start: int = 0) -> Tensor:
    """Standard normal numbers, float32, within +-5.3."""
    return torch.special.ndtri(uniform(key, stream, shape, start))
