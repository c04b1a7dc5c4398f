"""Files that anyone may have edited, read as data.

What is read is a plain file of a bounded size (no pipe, no device), as JSON of a bounded depth and
of the shape that is asked for; anything else is one StudyError that names the file. Nothing is
written through a link that leads out of the folder that was named.
"""

from __future__ import annotations

import errno
import os
import stat
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from study.errors import StudyError

MOST = 1 << 24  # bytes of a file of JSON, or of a log


def plain(path: Path, most: int) -> BinaryIO:
    """The file, open. Raises OSError for what is no plain file, which may never end, and for more
    than `most` bytes, also where they are holes."""

    def opened(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # a pipe without a writer would wait for one

    file = open(path, "rb", opener=opened)  # noqa: SIM115 - it is returned open
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= most:
        return file
    file.close()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "no plain file", str(path))
    raise OSError(errno.EFBIG, f"over {most} bytes", str(path))


def content(path: Path, most: int = MOST, where: str | None = None) -> bytes | None:
    """The bytes of a plain file; None where there is no such file.

    Raises StudyError, beginning with `where` (the path), for more than `most` bytes, for what is
    no plain file or can't be read.
    """
    where = str(path) if where is None else where
    try:
        with plain(path, most) as file:
            data = file.read(most + 1)  # it may grow meanwhile
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StudyError(f"{where}: cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise StudyError(f"{where}: cannot be read: over {most} bytes")
    return data


def decoded(data: bytes, shape: Any, where: str) -> Any:  # noqa: ANN401 - JSON holds anything
    """The value of JSON, plain, once it has been found to be of the shape. Raises StudyError."""
    try:
        value = msgspec.json.decode(data)
        msgspec.convert(value, shape)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise StudyError(f"{where}: cannot be read: {error}") from None
    return value


def packed(path: Path) -> bool:
    """Whether the file is a zip archive that says it comes to more bytes than it has. Raises
    whatever a torn archive leads to."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return sum(part.file_size for part in archive.infolist()) > path.stat().st_size


def inside(path: Path, root: Path) -> None:
    """Raises StudyError where the path, links followed, lies outside of root."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        raise StudyError(f"{path}: a link that leads out of {root}, to {real}; allowed: none that "
                         "does")  # fmt: skip


def check_entries(
    folder: Path, root: Path, files: Collection[str] = (), folders: Collection[str] = ()
) -> None:
    """No entry of the folder is a link out of root, and those that are named are plain files and
    folders. Raises StudyError; a folder that is not there has no entries."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    inside(Path(entry.path), root)
                if entry.name in files and not entry.is_file():
                    raise StudyError(f"{entry.path}: a plain file belongs there")
                if entry.name in folders and not entry.is_dir():
                    raise StudyError(f"{entry.path}: a folder belongs there")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StudyError(f"{folder}: cannot be read: {error.strerror}") from None
