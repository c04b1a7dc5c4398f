"""What runs beside a block: forked before it, joined after it, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from study import streams

Log = list[str]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Streams that write down what they are asked for; the current one is `here`."""
    said: Log = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield
        said.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("here"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(streams, "_side", lambda _: Stream("side"))
    return said


def batch_of(numbers: int) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, numel=lambda: numbers, device="cuda:0")


def test_the_side_starts_after_what_was_before_and_is_waited_for(log: Log) -> None:
    with streams.beside(batch_of(streams.SMALL)) as aside:
        with aside:
            log.append("target")
        log.append("student")
    assert log == ["side waits for here", "on side", "target", "off side", "student",
                   "here waits for side"]  # fmt: skip


def test_it_is_waited_for_where_a_pass_fails(log: Log) -> None:
    with pytest.raises(MemoryError), streams.beside(batch_of(1)):
        raise MemoryError
    assert log[-1] == "here waits for side"


@pytest.mark.parametrize("x", [torch.zeros(1), batch_of(streams.SMALL + 1)], ids=["cpu", "large"])
def test_passes_follow_each_other_on_a_cpu_and_over_large_batches(log: Log, x: object) -> None:
    with streams.beside(x) as aside, aside:
        pass
    assert not log
