"""Published files, fetched whole and with the published md5, or not at all."""

import hashlib
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from rich.console import Console
from rich.progress import Progress

from study.errors import StudyError

TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 18


def md5(path: Path) -> str:
    """MD5 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def download(url: str, path: Path, size: int, digest: str, advice: str) -> Path:
    """Fetch url to path, with progress; returns path.

    Raises StudyError, ending with the advice, if the download fails or gives anything but `size`
    bytes of md5 `digest`; then there is no file, nor a part of one.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file, Progress(console=Console(stderr=True)) as progress:
                task = progress.add_task(path.name, total=size)
                left = size + 1  # one byte too many is enough to refuse it
                while left and (chunk := response.read(min(CHUNK, left))):
                    left -= file.write(chunk)
                    progress.advance(task, len(chunk))
                file.flush()
                os.fsync(file.fileno())
        found = f"{part.stat().st_size} bytes with md5 {md5(part)}"
        allowed = f"{size} bytes with md5 {digest}"
        if found != allowed:
            raise StudyError(f"{url}: found {found}; allowed: {allowed}. {advice}")
        os.replace(part, path)
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is the server's answer too, with a socket
        raise StudyError(f"{url}: the download failed: {error}. {advice}") from error
    finally:
        part.unlink(missing_ok=True)
    return path
