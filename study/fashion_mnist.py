"""Fashion-MNIST: 28 x 28 grey images of ten kinds of clothing, 60 000 + 10 000, lossless.

Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747. Four IDX files are looked for in a data folder of the
user's, then where Debian's package dataset-fashion-mnist puts them, and are downloaded only if
neither has them. An IDX file is 0, 0, the element type, the number of dimensions, each dimension
as a big-endian uint32, then the elements; the type here is always 0x08, unsigned bytes.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from study.errors import StudyError
from study.fetch import download, md5

BASE_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEFAULT_ROOT = Path("data/fashion_mnist")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CHUNK = 1 << 18
UNSIGNED_BYTE = 0x08


class Published(NamedTuple):
    """One file as Zalando publishes it."""

    name: str
    item: tuple[int, ...]  # shape of one element
    md5: str
    size: int  # bytes


FILES = {
    "train_images": Published(
        "train-images-idx3-ubyte.gz", (28, 28), "cf8536b0aa1a6ac5fa3f23001093305c", 26_421_856
    ),
    "train_labels": Published(
        "train-labels-idx1-ubyte.gz", (), "10bea18fdb374794d4bb42e356e600c9", 29_491
    ),
    "test_images": Published(
        "t10k-images-idx3-ubyte.gz", (28, 28), "f78720b4224f21cce2f2ccf2d7a94c9a", 4_422_079
    ),
    "test_labels": Published(
        "t10k-labels-idx1-ubyte.gz", (), "0d30e22e447f3c33dab9ed536400ac01", 5_125
    ),
}


def load(root: Path | None = None) -> dict[str, np.ndarray]:
    """Return train_images (60000, 28, 28), train_labels (60000,), test_images and test_labels.

    All uint8. The files come from `root` (default data/fashion_mnist of the working directory),
    else from Debian's folder, else they are downloaded into `root`. Files in `root` may be the
    user's own, gzipped or not, with any number of images; what is downloaded must match the
    published md5. Raises StudyError if a file is torn or is not what its name says, if `root`
    holds only some of the user's own files, or if a download fails.
    """
    root = DEFAULT_ROOT if root is None else Path(root)
    paths = {key: path or _download(root, FILES[key]) for key, path in find(root).items()}
    arrays = {key: read_idx(path, FILES[key].item) for key, path in paths.items()}
    for part in ("train", "test"):
        images, labels = len(arrays[f"{part}_images"]), len(arrays[f"{part}_labels"])
        if images != labels:
            found = f"found {labels} labels for {images} images"
            raise StudyError(f"{paths[f'{part}_labels']}: {found}; allowed: {images}")
    return arrays


def find(root: Path) -> dict[str, Path | None]:
    """Where each file lies, in `root` or else all in Debian's folder; None of one that is to be
    downloaded. Raises StudyError if `root` holds only some of the user's own files."""
    paths = {key: _find(root, published) for key, published in FILES.items()}
    if None in paths.values():
        installed = {key: _find(DEBIAN, published) for key, published in FILES.items()}
        # A user's own files are never completed with published ones: the labels would not fit.
        for key, path in paths.items():
            if path is not None and md5(path) != FILES[key].md5:
                missing = [FILES[key].name for key, found in paths.items() if found is None]
                raise StudyError(
                    f"{root}: {path.name} is not the published file, and beside it "
                    f"{', '.join(missing)} is missing; put all four files there, or none"
                )
        paths = installed if None not in installed.values() else paths
    return paths


def read_idx(path: Path, item: tuple[int, ...]) -> np.ndarray:
    """Read one IDX file of unsigned bytes, gzipped if its name ends in .gz, as (n, *item) uint8.

    Never reads more than the header promises. Raises StudyError, naming the file, unless magic,
    element type, dimensions and length all agree and n is at least 1.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse(file, path, item)
    except (OSError, EOFError, zlib.error) as error:
        raise StudyError(f"{path}: cannot be read as an IDX file: {error}") from error


def _parse(file: BinaryIO, path: Path, item: tuple[int, ...]) -> np.ndarray:
    dimensions = 1 + len(item)
    header = file.read(4 + 4 * dimensions)
    allowed = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if header[:4] != allowed:
        raise StudyError(
            f"{path}: found magic {header[:4].hex(' ')}; allowed: {allowed.hex(' ')} "
            f"(unsigned bytes, {dimensions} dimensions)"
        )
    if len(header) < 4 + 4 * dimensions:
        raise StudyError(f"{path}: the header is cut after {len(header)} bytes")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if shape[1:] != item or shape[0] == 0:
        expected = " x ".join(["n", *map(str, item)])
        raise StudyError(
            f"{path}: found shape {' x '.join(map(str, shape))}; allowed: {expected}, n at least 1"
        )
    promised, data = math.prod(shape), bytearray()  # which grows with what is there alone
    while len(data) < promised and (chunk := file.read(min(CHUNK, promised - len(data)))):
        data += chunk
    if len(data) < promised:
        raise StudyError(f"{path}: found {len(data)} bytes of data; the header says {promised}")
    if file.read(1):  # at the end of a gzip file this also checks its CRC
        raise StudyError(f"{path}: found more than the {promised} bytes that the header says")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _find(folder: Path, published: Published) -> Path | None:
    """The gzipped file, else the plain one, else None."""
    for name in (published.name, published.name.removesuffix(".gz")):
        if (folder / name).is_file():
            return folder / name
    return None


def _download(root: Path, published: Published) -> Path:
    """Fetch one file into root, whole and with the published md5, or leave nothing there."""
    url, names = BASE_URL + published.name, ", ".join(file.name for file in FILES.values())
    advice = f"Try again, or put the files {names} into {root}"
    return download(url, root / published.name, published.size, published.md5, advice)
