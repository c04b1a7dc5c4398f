"""samples.png of a run, read as a picture that anyone may have put there."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from study.bounded import content
from study.errors import StudyError

LARGEST = 4096  # pixels a side


def picture(path: Path, where: str) -> np.ndarray | None:
    """Pixels (H, W) or (H, W, 3), uint8; None where there is no such file. Raises StudyError,
    beginning with `where`, for what is no PNG, torn, or larger than any that a run makes."""
    data = content(path, where=where)
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if max(image.size) > LARGEST:
                raise ValueError(f"{image.width} x {image.height} pixels; allowed: {LARGEST}")
            return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except UnidentifiedImageError:  # its message holds an address in memory
        raise StudyError(f"{where}: cannot be read: no PNG") from None
    except Exception as error:  # decoders raise whatever a torn file leads them to
        raise StudyError(f"{where}: cannot be read: {error}") from None
