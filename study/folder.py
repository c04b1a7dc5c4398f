"""Images of a user's own, a folder or a zip archive of them: decoded once, kept in a cache folder.

PNG, JPEG, BMP and WebP, all of one square size and all grey or all RGB. Folders train/ and test/
(or held_out/, or val/) are the parts, else some images are set aside. Names are sorted, so the
order is the same on every machine. An archive, EDM's among them, is read in memory and never
unpacked to disk; no study reads labels, so its dataset.json is left alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress

from study import seeds
from study.bounded import packed
from study.errors import StudyError
from study.store import write_bytes

DECODER = 1  # raise it when the same files come to other images
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
READ = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
REFUSED = (".avif", ".gif", ".pgm", ".ppm", ".tif", ".tiff")  # never left out in silence
MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB"}
HELD_OUT = ("held_out", "test", "val")  # the first that is there; the others are not read
ALLOWED = "allowed: a folder or a zip archive of images"
SIDE = 1024  # pixels; an image that says it has more is not decoded
LARGEST = 1 << 27  # bytes of one file or archive member
FREE, RATIO = 1 << 30, 100  # bytes that images may come to whatever they have, and for each byte

T = TypeVar("T")


class Source(NamedTuple):
    """A folder or archive: size and stamps of each file by its path below root, the folders at
    the top, a file's bytes by its path."""

    root: Path
    files: dict[str, tuple[int, ...]]
    folders: set[str]
    content: Callable[[str], bytes]

    def read(self, name: str) -> bytes:
        """A file's bytes, of which there are not too many."""
        if self.files[name][0] > LARGEST:
            raise ValueError(f"found {self.files[name][0]} bytes; allowed: {LARGEST}")
        return self.content(name)


def load(root: Path, held_out: int | None) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Return (images, paths below root) of train and held_out from a folder or a zip archive.

    Images are (n, S, S, C) uint8 in 0..255 with C 1 or 3, each part in the order of its sorted
    paths. held_out: how many images to set aside where root has no parts of its own, by a
    permutation that depends on nothing but how many images there are; else None. Alpha is dropped,
    palettes are looked up. Raises StudyError, naming the file or folder: for what is missing,
    empty, torn, no image, of more than 8 bits, of another size or mode than the others; for
    held_out where it is needed, too large or not used.
    """
    root = Path(root)
    try:
        with _opened(root) as source:
            parts = _split(source, held_out)
            names = sorted(parts["train"] + parts["held_out"])
            images = _kept(source, names)
    except (OSError, zipfile.BadZipFile, MemoryError) as error:
        raise StudyError(f"{root}: cannot be read: {error}") from error
    place = {name: i for i, name in enumerate(names)}
    return {p: (images[[place[name] for name in chosen]], chosen) for p, chosen in parts.items()}


@contextmanager
def _opened(root: Path) -> Iterator[Source]:
    """The folder or archive, which stays open meanwhile; hidden files are not seen."""
    if root.is_dir():
        folders = {path.name for path in root.iterdir() if path.is_dir()}
        yield Source(root, dict(_walk(root)), folders, lambda name: (root / name).read_bytes())
    elif root.is_file():
        try:
            archive = zipfile.ZipFile(root)  # gives no more bytes than file_size says
        except Exception as error:  # a torn one leads its reader to raise anything
            told = f"cannot be read as a zip archive: {error!r}"
            raise StudyError(f"{root}: {told}; {ALLOWED}") from error
        with archive:
            members = {i.filename: i for i in archive.infolist() if "/." not in f"/{i.filename}"}
            files = {name: (i.file_size, i.CRC) for name, i in members.items() if not i.is_dir()}
            folders = {name.split("/")[0] for name in members if "/" in name}
            yield Source(root, files, folders, archive.read)
    else:
        found = "neither a folder nor a file" if root.exists() else "there is no such folder"
        raise StudyError(f"{root}: {found}; {ALLOWED}")


def _walk(root: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Path below root, and (size, mtime, ctime), of each image; links are followed."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            raise StudyError(f"{folder}: comes twice, through a link; its images would too")
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(folder, root)
        for name in names:
            if not name.startswith(".") and name.lower().endswith(READ + REFUSED):
                status = os.stat(os.path.join(folder, name))
                if not stat.S_ISREG(status.st_mode):  # a pipe or device may never end
                    raise StudyError(f"{os.path.join(folder, name)}: no plain file")
                stamps = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                yield name if below == "." else f"{below}/{name}", stamps


def _split(source: Source, held_out: int | None) -> dict[str, list[str]]:
    """Sorted paths of train and held_out."""
    root, given = source.root, f"data.held_out: {held_out} given"
    names = sorted(name for name in source.files if name.lower().endswith(READ + REFUSED))
    other = next((part for part in HELD_OUT if part in source.folders), None)
    if "train" in source.folders and other:
        if held_out is not None:
            raise StudyError(f"{given}; leave it out: {root} has train and {other}")
        parts = {"train": "train/", "held_out": f"{other}/"}
        parts = {key: [n for n in names if n.startswith(part)] for key, part in parts.items()}
        if not all(parts.values()):
            empty = other if parts["train"] else "train"
            raise StudyError(f"{root / empty}: no image in it; allowed: {', '.join(READ)}")
        return parts
    if not names:
        raise StudyError(f"{root}: no image in it; allowed: {', '.join(READ)}")
    if held_out is None:
        found = ", ".join(sorted(source.folders)[:5]) or "none"
        raise StudyError(
            f"data.held_out: missing; say how many of the {len(names)} images of {root} to hold "
            f"out, or give it folders train and test (found: {found})"
        )
    if not 0 < held_out < len(names):
        raise StudyError(f"{given}; allowed: 1 to {len(names) - 1}, of the images of {root}")
    order = np.random.RandomState(seeds.number(0, "data", "set aside", len(names)) % 2**32)
    chosen = np.zeros(len(names), dtype=bool)
    chosen[order.permutation(len(names))[:held_out]] = True
    parts = {"train": ~chosen, "held_out": chosen}
    return {key: [names[i] for i in np.flatnonzero(rows)] for key, rows in parts.items()}


def _pixels(source: Source, name: str) -> np.ndarray:
    """One image (S, S, C) uint8; StudyError where it is none, or not one of those allowed."""
    try:
        with Image.open(io.BytesIO(source.read(name)), formats=FORMATS) as image:
            if image.width != image.height or image.width > SIDE:
                found = f"found {image.width} x {image.height}"
                raise ValueError(f"{found} pixels; allowed: square, at most {SIDE} a side")
            deep = ";16B" in str(image.tile)  # Pillow would cut colours of 16 bits down to 8
            if image.mode not in MODES or deep:
                found = image.mode + " of 16 bits" * deep
                raise ValueError(f"found mode {found}; allowed: grey or RGB of 8 bits")
            # A palette goes through RGBA: straight to RGB, Pillow warns of its transparency.
            flat = image.convert("RGBA") if image.mode == "P" else image
            return np.array(flat.convert(MODES[image.mode])).reshape(*image.size, -1)
    except UnidentifiedImageError:
        raise StudyError(f"{source.root / name}: none of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise whatever a torn file leads them to
        raise StudyError(f"{source.root / name}: cannot be decoded: {error}") from error


def _decode(source: Source, names: list[str]) -> np.ndarray:
    """All images (n, S, S, C) uint8, in the order of the names."""
    first = _pixels(source, names[0])
    stored = sum(source.files[name][0] for name in names)
    if (come := first.nbytes * len(names)) > max(FREE, RATIO * stored):
        raise StudyError(
            f"{source.root}: {len(names)} files of {stored} bytes in all say that they are "
            f"{'x'.join(map(str, first.shape))} pixels each, {come} bytes; allowed: "
            f"{RATIO} times what the files have"
        )
    images = np.empty((len(names), *first.shape), np.uint8)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for i, name in enumerate(progress.track(names, description=source.root.name)):
            pixels = _pixels(source, name)
            if pixels.shape != first.shape:
                found, others = (
                    f"{len(x)} x {len(x)} {'RGB' if x.shape[2] == 3 else 'grey'}"
                    for x in (pixels, first)
                )
                raise StudyError(
                    f"{source.root / name}: found {found}; {names[0]} and any other image before "
                    f"it is {others}; allowed: one size and mode"
                )
            images[i] = pixels
    return images


def cache_folder() -> Path:
    """consistency-gap in XDG_CACHE_HOME, else in ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "consistency-gap"


def kept(
    name: str,
    what: str,
    read: Callable[[Path], T | None],
    make: Callable[[], T],
    stored: Callable[[T], bytes],
) -> T:
    """What a file of the cache folder holds, made where `read` finds none in it.

    One process makes it while others that want the same wait; without a folder that can be written
    each makes its own, with a warning that `what` can't be kept.
    """
    path, found = cache_folder() / name, None
    try:
        found = read(path)  # needs no lock, so also a folder that is only readable
        if found is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = read(path)
            if found is None:
                found = make()
                write_bytes(path, stored(found))
    except (OSError, MemoryError) as error:
        warnings.warn(f"{path}: {what} can't be kept ({error})", stacklevel=3)
    return make() if found is None else found


def npz(**arrays: np.ndarray) -> bytes:
    """An .npz file of the arrays."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; none where it is missing, torn (it has a checksum) or packed."""
    try:
        if packed(path):
            return {}
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return {name: x for name, x in found.items() if isinstance(x, np.ndarray)}
    except Exception:  # whatever a torn file leads the reader to
        return {}


def _kept(source: Source, names: list[str]) -> np.ndarray:
    """The decoded images, from the cache unless the path, size or times of a file are others."""
    stamps = [(name, *source.files[name]) for name in names]
    listing = repr((DECODER, str(source.root.resolve()), stamps)).encode()
    return kept(
        f"images-{hashlib.sha256(listing).hexdigest()[:16]}.npz",
        "the decoded images",
        lambda path: _cached(path, len(names)),
        lambda: _decode(source, names),
        lambda images: npz(images=images),
    )


def _cached(path: Path, count: int) -> np.ndarray | None:
    """The images, or None where the file has none, or not so many."""
    images = arrays(path).get("images", np.empty(0))
    return images if images.dtype == np.uint8 and images.shape[:1] == (count,) else None
