"""The process entry that the launcher can name without importing torch."""

from __future__ import annotations

from typing import Any


def main(*arguments: Any) -> None:  # noqa: ANN401
    """Hands over to the worker, whose import the fork server has already paid for."""
    from study import worker

    worker.main(*arguments)
