"""Addressed randomness: a random number is looked up by who asks for what, never consumed.

number(seed, role, stream, index) is the 63-bit seed of the generator for one stretch of one stream
('order', 'x', 'noise', 'time', 'mask', 'init', 'sample'). Role is 'teacher' for sources and
'student' for variants, so a student never meets the exact noisy points that its teacher was fitted
to, while all variants of a block meet the same images, noise and times at the same image count.
"""

from __future__ import annotations

import hashlib


def number(seed: int, *address: object) -> int:
    """A 63-bit integer, uniform over addresses (BLAKE2b of the address)."""
    text = "\x1f".join(str(part) for part in (seed, *address))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
