"""CIFAR-10: 32 x 32 colour images of ten classes, 50 000 + 10 000, lossless.

Krizhevsky 2009, Learning multiple layers of features from tiny images. The official Python archive
is looked for in a folder of the user's, whole or unpacked, and downloaded only if it is not there.
Its six batches are pickles of Python 2, a dict of "data", a numpy array (n, 3072) of unsigned
bytes whose rows are 1 024 red values, row after row of the image, then green, then blue, and of
"labels", a list of n numbers 0 to 9. They are read by `pickles.restricted`, with stand-ins for the
three names of numpy that such an array needs; the archive is read in memory, never unpacked.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from reprlib import repr  # of a few items and levels, whatever it is given
from typing import BinaryIO

import numpy as np

from study.bounded import content, plain
from study.errors import StudyError
from study.fetch import CHUNK, download
from study.pickles import restricted

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
SIZE = 170_498_071  # bytes
ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
DEFAULT_ROOT = Path("data/cifar10")
PARTS = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
BATCHES = (*PARTS["train"], *PARTS["test"])
OTHERS = ("batches.meta", "readme.html")  # in the archive and not read
LARGEST = 1 << 26  # bytes of one batch; the official ones have 31 million
UNPACKED = 1 << 28  # bytes that an archive may come to; the official one comes to 186 million
SIDE, CLASSES = 32, 10
ROW = 3 * SIDE * SIDE


def load(root: Path | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (images, labels) of train (50 000) and test (10 000).

    Images are (n, 32, 32, 3) uint8, labels (n,) int64, in the order of the batches. They come from
    the folder cifar-10-batches-py in `root` (default data/cifar10 of the working directory), else
    from the archive there, else it is downloaded into `root`. What is there may be the user's own,
    of that layout, with any number of images; what is downloaded must match the published md5.
    Raises StudyError, naming file and member, for what is missing, torn, or not what it should be.
    """
    root = DEFAULT_ROOT if root is None else Path(root)
    path = find(root)
    if path is None:
        advice = f"Try again, or put {ARCHIVE} into {root}"
        path = download(URL, root / ARCHIVE, SIZE, MD5, advice)
    try:
        read = dict(_unpacked(path) if path.is_dir() else _members(path))
    except StudyError:
        raise
    except Exception as error:  # a torn or forged archive leads its readers to raise anything
        told = getattr(error, "strerror", None) or error
        raise StudyError(f"{path}: cannot be read: {told}") from error
    if missing := [name for name in BATCHES if name not in read]:
        raise StudyError(f"{path}: {', '.join(missing)} is missing; allowed: all six batches")
    return {
        part: tuple(np.concatenate(arrays) for arrays in zip(*map(read.get, names), strict=True))
        for part, names in PARTS.items()
    }


def find(root: Path) -> Path | None:
    """The unpacked folder, else the archive, else None."""
    return next((p for p in (root / FOLDER, root / ARCHIVE) if p.exists()), None)


def _unpacked(folder: Path) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Each batch that is there, by its name."""
    for path in (folder / name for name in BATCHES):
        if (data := content(path, LARGEST)) is not None:
            yield path.name, read_batch(data, str(path))


def _members(path: Path) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Each batch of the archive by its name; an archive of anything else is refused."""
    seen = set()
    with plain(path, UNPACKED) as packed, gzip.open(packed) as file:
        stream = _Bounded(file, str(path))
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                where, name = f"{path}: {member.name}", member.name.removeprefix(f"{FOLDER}/")
                if member.isdir() and member.name == FOLDER:
                    continue
                if member.name != f"{FOLDER}/{name}" or name not in (*BATCHES, *OTHERS):
                    allowed = ", ".join((*BATCHES, *OTHERS))
                    raise StudyError(f"{where}: no such member; allowed, in {FOLDER}/: {allowed}")
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise StudyError(f"{where}: a link or special file; allowed: plain files")
                if name in seen:
                    raise StudyError(f"{where}: comes twice")
                seen.add(name)
                _small(member.size, LARGEST, where)
                if name in BATCHES:
                    yield name, read_batch(archive.extractfile(member).read(), where)
        while stream.read(CHUNK):  # to the end, where gzip checks its sum
            pass


class _Bounded:
    """A stream that gives at most UNPACKED bytes: a small archive may come to any number."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.file, self.where, self.given = file, where, 0

    def read(self, size: int) -> bytes:
        """Up to size bytes."""
        data = self.file.read(size)
        self.given += len(data)
        _small(self.given, UNPACKED, self.where)
        return data


def _small(size: int, largest: int, where: str) -> None:
    """Refuses more bytes than there should be."""
    if size > largest:
        raise StudyError(f"{where}: found {size} bytes or more; allowed: {largest}")


def read_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) uint8 and labels (n,) int64 of one batch's bytes.

    Executes nothing. Raises StudyError, beginning with `where`, for a pickle of anything else.
    """
    batch = restricted(data, _stand_ins(where), where, LARGEST)
    found = type(batch).__name__
    if isinstance(batch, dict):
        images, labels = batch.get(b"data"), batch.get(b"labels")
        found = f"a dict of {', '.join(sorted(map(repr, batch)))[:200]}"
        if isinstance(getattr(images, "value", None), np.ndarray) and isinstance(labels, list):
            images = images.value
            if len(labels) != len(images):
                raise StudyError(f"{where}: found {len(labels)} labels for {len(images)} images")
            if not all(type(label) is int and 0 <= label < CLASSES for label in labels):
                raise StudyError(f"{where}: found a label that is no whole number from 0 to 9")
            images = images.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
            return images, np.array(labels, np.int64)
    raise StudyError(
        f"{where}: found {found}; allowed: a dict of data, an array, and labels, a list"
    )


def _stand_ins(where: str) -> dict[tuple[str, str], Callable]:
    """What a batch may ask for, made anew for each: they take the arguments that an array of bytes
    has, keep them as they are, and make the array of nothing but a checked shape and the bytes."""

    class Array:
        """An array (n, 3072) of unsigned bytes; it is `value`."""

        __slots__ = ("value",)

        def __setstate__(self, state: tuple) -> None:
            _, shape, dtype, fortran, values = state
            if not isinstance(dtype, Bytes) or not isinstance(values, bytes):
                raise StudyError(f"{where}: found an array of something other than bytes")
            n, row = shape
            if row != ROW or n < 1 or n * row != len(values):
                raise StudyError(
                    f"{where}: found shape {repr(shape)} over {len(values)} bytes; allowed: "
                    f"(n, {ROW}), n at least 1"
                )
            order = "F" if fortran else "C"
            self.value = np.frombuffer(values, np.uint8).reshape((n, row), order=order)

    class Bytes:
        """The type "u1", whose byte order and flags mean nothing."""

        __slots__ = ()

        def __setstate__(self, state: tuple) -> None:
            pass

    def ndarray() -> None:
        raise StudyError(f"{where}: the pickle calls numpy.ndarray itself")

    def reconstruct(*_: object) -> Array:
        return Array()

    def dtype(kind: object, *_: object) -> Bytes:
        if kind != b"u1":
            raise StudyError(f"{where}: found elements of type {repr(kind)}; allowed: b'u1'")
        return Bytes()

    return {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy", "ndarray"): ndarray,
        ("numpy", "dtype"): dtype,
    }
