"""Names of feature extractors and the digests of their weights, known without torch.

A number measured with one extractor means nothing beside another's, so NAME:DIGEST, the first 8
hexadecimal digits of the SHA-256 of the file of weights, belongs to every number's settings;
where that file lies does not.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from study.bounded import plain
from study.errors import StudyError, nearest

FOLDER = Path(__file__).parent
DIGITS = 8
LARGEST = 1 << 30  # bytes of a file of weights; the published one has 96 million
INCEPTION = "inception-v3-compat"
PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # its SHA-256


def shipped() -> list[str]:
    """The in-domain extractors of this package; each is named DATA-..."""
    return sorted(p.stem for p in FOLDER.glob("*.pt"))


def is_inception(identity: str) -> bool:
    """Whether NAME or NAME:DIGEST is of InceptionV3."""
    return identity.partition(":")[0] == INCEPTION


def digest_of(path: Path) -> str:
    """The digest of a file of weights. Raises OSError, of what is no plain file too."""
    with plain(path, LARGEST) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


_taken = cache(digest_of)  # once a process: a plan asks for every measurement


def extractor_identity(name: str, weights: str | None = None) -> str:
    """NAME:DIGEST of a known extractor; weights: the user's file for InceptionV3, null the
    published one, whose digest is known without it. Raises OSError where a file cannot be read."""
    if name != INCEPTION:
        return f"{name}:{_taken(FOLDER / f'{name}.pt')}"
    return f"{name}:{PUBLISHED[:DIGITS] if weights is None else _taken(Path(weights))}"


def check_extractor(name: str, weights: str | None, where: str) -> None:
    """An extractor is known, and its weights can be read. where: file and key path of what asks
    for it."""
    known = [*shipped(), INCEPTION]
    if name not in known:
        raise StudyError(f"{where}.extractor: {name!r}; {nearest(name, known)}")
    if name != INCEPTION and weights is not None:
        raise StudyError(f"{where}.weights: {weights!r} given; {name} has its own, drop the key")
    try:
        extractor_identity(name, weights)
    except OSError as error:
        raise StudyError(
            f"{where}.weights: {weights}: cannot be read ({error.strerror}); put "
            "torch-fidelity's file of InceptionV3's weights there, or drop the key to have it "
            "downloaded"
        ) from None
