"""Gradients of weights in pieces of the batch: the whole's, and of the same bits every time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from study import convolution
from study.student import counted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layer(inp: int, out: int, size: int = 3) -> nn.Conv2d:
    torch.manual_seed(0)
    made = nn.Conv2d(inp, out, size, padding=size // 2)
    return made.to(DEVICE, memory_format=torch.channels_last)


def images(rows: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(rows, channels, 5, 4, generator=generator).to(DEVICE)
    return h.contiguous(memory_format=torch.channels_last)


def derived(function: object, h: Tensor, net: nn.Conv2d) -> list[Tensor]:
    net.zero_grad()
    h = h.detach().requires_grad_()
    y = function(h)
    y.float().square().sum().backward()
    return [y.detach(), h.grad, net.weight.grad]


def pieces_made(function: object, h: Tensor, net: nn.Conv2d) -> bool:
    return "Pieces" in type(function(h, net).grad_fn).__name__


@pytest.mark.parametrize("rows", [4, 7])  # the last piece full, or not
def test_gradients_are_those_of_the_whole_batch(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "PIECE", 2)
    net, h = layer(6, 4).double(), images(rows, 6).double()
    assert pieces_made(convolution.convolved, h, net)
    found = derived(lambda h: convolution.convolved(h, net), h, net)
    expected = derived(lambda h: F.conv2d(h, net.weight, None, 1, 1), h, net)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_only_large_batches_of_layers_that_narrow_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "PIECE", 2)
    cut = {
        (rows, inp, out, size): pieces_made(
            convolution.convolved, images(rows, inp), layer(inp, out, size)
        )
        for rows, inp, out, size in ((3, 6, 4, 3), (2, 6, 4, 3), (3, 4, 4, 3), (3, 6, 4, 1))
    }
    assert cut == {
        (3, 6, 4, 3): True,
        (2, 6, 4, 3): False,
        (3, 4, 4, 3): False,
        (3, 6, 4, 1): False,
    }


def test_a_half_precision_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "PIECE", 1)
    net, h = layer(6, 4), images(64, 6)
    exact = derived(lambda h: F.conv2d(h, net.weight, None, 1, 1), h.bfloat16().float(), net)[2]
    found = derived(lambda h: convolution.convolved(h, net), h.bfloat16(), net)[2]
    assert found.dtype == torch.float32
    # 64 gradients, each rounded to 8 bits, whose sum is not: their errors mostly cancel
    assert (found - exact).norm() < 2**-8 * exact.norm()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_with_the_same_bits(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "PIECE", 2)
    net, h = layer(6, 4), images(5, 6)

    def function(h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, torch.bfloat16, cache_enabled=False):
            return convolution.convolved(h.bfloat16(), net)

    whole = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    found, expected = (derived(f, h, net) for f in (whole, function))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_it_counts_as_the_convolution_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "PIECE", 2)
    net, h, found = layer(6, 4), images(5, 6), []
    for function in (lambda h: convolution.convolved(h, net), lambda h: net(h)):
        with counted() as flops:
            derived(function, h, net)
        found.append(flops())
    assert found[0] == found[1] == 3 * 2 * 5 * 20 * 6 * 4 * 9


def test_only_convolutions_that_keep_the_size_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "PIECE", 2)
    strided = nn.Conv2d(6, 4, 3, stride=2, padding=1).to(DEVICE)
    assert convolution.convolved(images(3, 6), strided).shape == (3, 4, 3, 2)


def test_the_operator_keeps_torchs_contract() -> None:
    h, dy, w = images(3, 6), images(3, 4), layer(6, 4).weight.detach()
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.study.weight_gradient, (dy, h, w), test_utils=checks)
