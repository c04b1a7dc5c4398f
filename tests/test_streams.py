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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_numbers_read_later_are_those_of_their_time(device: str) -> None:
    values = torch.tensor([1.5, -2.0], device=device)
    first = streams.later(values * 2)
    read = [streams.later(values + i) for i in range(3)]
    assert first() == [3.0, -4.0]
    assert [r() for r in read] == [[1.5 + i, i - 2.0] for i in range(3)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU nothing is waited for")
def test_numbers_read_later_do_not_wait_for_what_follows_them() -> None:
    values = torch.ones(2, device="cuda")
    read, after = streams.later(values), torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # a second
    after.record()
    assert read() == [1.0, 1.0] and not after.query()
