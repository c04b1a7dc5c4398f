"""DDPM++ against EDM's: names, shapes, values, initial weights; and as one of our networks."""

from __future__ import annotations

import itertools
import math
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from study import ddpmpp, factors, subjects
from study.errors import StudyError
from study.meaning import simplest
from study.networks import build
from study.noise import dropout
from study.parts import doubled
from study.student import counted

SMALL = subjects.DdpmPP(width=8, mult=(1, 2, 2), blocks=2, attention=(4,))
FEW = subjects.DdpmPP(width=8, mult=(1, 2), blocks=1, attention=(4,))
SHAPE = (3, 8, 8)

# EDM's network for 32 x 32 by its description: block, channels in and out; a: attention, s: a
# 1 x 1 convolution on the skip. The decoder's inputs are its own channels and the encoder's
CIFAR10 = """
enc.32x32_block0 128 256 s
enc.32x32_block1 256 256
enc.32x32_block2 256 256
enc.32x32_block3 256 256
enc.16x16_down   256 256 s
enc.16x16_block0 256 256 a
enc.16x16_block1 256 256 a
enc.16x16_block2 256 256 a
enc.16x16_block3 256 256 a
enc.8x8_down     256 256 s
enc.8x8_block0   256 256
enc.8x8_block1   256 256
enc.8x8_block2   256 256
enc.8x8_block3   256 256
dec.8x8_in0      256 256 a
dec.8x8_in1      256 256
dec.8x8_block0   512 256 s
dec.8x8_block1   512 256 s
dec.8x8_block2   512 256 s
dec.8x8_block3   512 256 s
dec.8x8_block4   512 256 s
dec.16x16_up     256 256 s
dec.16x16_block0 512 256 s
dec.16x16_block1 512 256 s
dec.16x16_block2 512 256 s
dec.16x16_block3 512 256 s
dec.16x16_block4 512 256 sa
dec.32x32_up     256 256 s
dec.32x32_block0 512 256 s
dec.32x32_block1 512 256 s
dec.32x32_block2 512 256 s
dec.32x32_block3 512 256 s
dec.32x32_block4 384 256 s
"""


def table() -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of the CIFAR-10 configuration."""
    weights = {
        "map_layer0": (512, 128),
        "map_layer1": (512, 512),
        "enc.32x32_conv": (128, 3, 3, 3),
        "dec.32x32_aux_norm": (256,),
        "dec.32x32_aux_conv": (3, 256, 3, 3),
    }
    for line in CIFAR10.split("\n")[1:-1]:
        name, inp, out, *has = line.split()
        i, o = int(inp), int(out)
        parts = {"norm0": (i,), "conv0": (o, i, 3, 3), "affine": (o, 512), "norm1": (o,)}
        parts |= {"conv1": (o, o, 3, 3)}
        if "s" in "".join(has):
            parts |= {"skip": (o, i, 1, 1)}
        if "a" in "".join(has):
            parts |= {"norm2": (o,), "qkv": (3 * o, o, 1, 1), "proj": (o, o, 1, 1)}
        weights |= {f"{name}.{part}": shape for part, shape in parts.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    return {f"{name}.weight": shape for name, shape in weights.items()} | biases


def formula(name: str, shape: torch.Size) -> Tensor:
    """A parameter without chance: the fractions of multiples of a root that its name picks, so
    large in the weights that what happens at the lowest resolution is seen in the output."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    u = (i * math.sqrt(2 + zlib.crc32(name.encode()) % 1000)) % 1 - 0.5
    if len(shape) > 1:
        u = 3 * u / math.sqrt(math.prod(shape[1:]))
    elif "norm" in name and name.endswith("weight"):
        u = u + 1
    return u.view(shape)


def filled(net: nn.Module) -> nn.Module:
    """The network with every parameter by the formula: no part of it is switched off."""
    for name, weight in net.named_parameters():
        weight.data.copy_(formula(name, weight.shape))
    return net


def made(kind: subjects.DdpmPP = SMALL, drop: float = 0.0, **more: object) -> nn.Module:
    return filled(build(kind, SHAPE, drop, 0, "student", **more))


def inputs(n: int = 2) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 8, 8) and noise labels (n,)."""
    x = torch.sin(torch.arange(n * math.prod(SHAPE), dtype=torch.float64) * 1.3)
    c_noise = torch.linspace(-1.4, 1.05, n, dtype=torch.float64)
    return x.view(n, *SHAPE).float(), c_noise.float()


# --- EDM's network ---


def test_names_and_shapes_are_those_of_edms_cifar10_network() -> None:
    state = build(subjects.DdpmPP(), (3, 32, 32), 0.0, 0, "student").state_dict()
    assert {name: tuple(w.shape) for name, w in state.items()} == table()
    assert sum(w.numel() for w in state.values()) == 55_732_739


def test_cifar10_forward_costs_its_convolutions() -> None:
    """42.4 GFLOP an image: convolutions, attention and labels, added up from the table."""
    expected = 0
    for name, shape in table().items():
        if name.endswith("bias") or len(shape) == 1:
            continue
        side = int(name.split(".")[1].split("x")[0]) if "." in name[:4] else 1
        rows = 1 if "affine" in name else side**2
        expected += 2 * math.prod(shape) * rows
        if "qkv" in name:
            expected += 4 * side**4 * shape[1]
    net = build(subjects.DdpmPP(), (3, 32, 32), 0.0, 0, "student")
    with torch.no_grad(), counted() as flops:
        net(torch.zeros(1, 3, 32, 32), torch.zeros(1))
    assert flops() == expected
    assert expected / 1e9 == pytest.approx(42.38, abs=0.01)


def test_values_are_those_of_the_published_network() -> None:
    """EDM's SongUNet, its DDPM++ settings and augment_dim 0, evaluated in float64 at the formula's
    weights; every 24th output."""
    published = [
        0.1992602073, 0.0139489690, -0.1297423361, -0.7121335066, -0.2490261652, -0.2552944968,
        0.5426420057, 0.4320675877, -0.1225497462, -0.5314952733, -0.4433317620, -0.5063951064,
        -0.3065132521, -0.2325215505, 0.5643741537, 0.5399091083]  # fmt: skip
    x = torch.sin(torch.arange(384, dtype=torch.float64) * 1.3).view(2, *SHAPE)
    c_noise = torch.tensor([-1.4, 1.05], dtype=torch.float64)
    y = made().double().body(x, c_noise, None)
    expected = torch.tensor(published, dtype=torch.float64)
    torch.testing.assert_close(y.flatten()[::24], expected, rtol=0, atol=1e-6)
    assert y.norm().item() == pytest.approx(10.0688190, abs=1e-6)


@pytest.mark.parametrize("size", [2, 8])
def test_resampling_is_edms_filter(size: int) -> None:
    """The filter [1, 1] / 2 along rows and columns: down with stride 2; up, times 4, as the
    transposed convolution."""
    generator = torch.Generator().manual_seed(0)
    quarter = torch.full((5, 1, 2, 2), 0.25)
    for ours, theirs in [
        (nn.AvgPool2d(2), lambda h: F.conv2d(h, quarter, stride=2, groups=5)),
        (doubled, lambda h: F.conv_transpose2d(h, 4 * quarter, stride=2, groups=5)),
    ]:
        h = torch.randn(3, 5, size, size, generator=generator, requires_grad=True)
        y, expected = ours(h), theirs(h)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        upstream = torch.randn(y.shape, generator=generator)
        gradients = [torch.autograd.grad(out, h, upstream)[0] for out in (y, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_initial_weights_are_edms() -> None:
    kind = subjects.DdpmPP(width=32, mult=(1, 2), blocks=1, attention=(4,))
    net = build(kind, SHAPE, 0.0, 3, "student", head=True)
    drawn = {}
    for name, w in net.named_parameters():
        if w.ndim == 1:
            one = "norm" in name and name.endswith("weight")
            assert torch.equal(w, torch.full_like(w, float(one)))
            continue
        fan_in, fan_out = w[0].numel(), w[:, 0].numel()
        small = name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight", "head.weight"))
        scale = 1e-5 if small else math.sqrt(0.2) if "qkv" in name else 1.0
        drawn[name] = w = w.detach() / (scale * math.sqrt(6 / (fan_in + fan_out)))
        assert 0.95 < w.abs().max() < 1 + 1e-6
        error = 1 / math.sqrt(w.numel())  # of uniform numbers in +-1: std 1 / sqrt(3)
        assert abs(w.mean()) < 4 * error / math.sqrt(3)
        assert abs(w.square().mean() - 1 / 3) < 4 * error * math.sqrt(4 / 45)
    assert len(drawn) > 30
    firsts = [w.flatten()[:8] for w in drawn.values()]
    assert all((a - b).abs().min() > 0 for a, b in itertools.combinations(firsts, 2))
    again, other = (build(kind, SHAPE, 0.0, seed, "student").state_dict() for seed in (3, 4))
    state = net.state_dict()
    for name in again:
        assert torch.equal(again[name], state[name])
        assert torch.equal(other[name], state[name]) == (state[name].ndim == 1)


# --- one of our networks ---


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (SMALL, (1, 8, 8)),
        (subjects.DdpmPP(width=12, mult=(3, 1), blocks=1, attention=()), (3, 6, 6)),
        (subjects.DdpmPP(width=4, mult=(1,), blocks=1, attention=(5,)), (1, 5, 5)),
        (subjects.DdpmPP(width=48, mult=(2, 1), blocks=1, attention=(28, 14)), (1, 28, 28)),
    ],
    ids=str,
)
def test_no_part_is_idle(kind: subjects.DdpmPP, shape: tuple[int, ...]) -> None:
    net = filled(build(kind, shape, 0.0, 0, "student"))
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 2, *shape, generator=generator)
    y = net(x, torch.tensor([-1.0, 0.5]))
    assert y.shape == x.shape and y.dtype == torch.float32
    alone = net(x[1:], torch.tensor([0.5]))
    torch.testing.assert_close(y[1:], alone, rtol=1e-4, atol=1e-5)  # rows don't mix
    (y * upstream).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_the_output_layer_is_in_the_state_once_and_a_head_beside_it() -> None:
    plain, second = (made(head=head) for head in (False, True))
    assert plain.out is plain.dec["8x8_aux_conv"]
    assert {*second.state_dict()} - {*plain.state_dict()} == {"head.weight", "head.bias"}
    assert not any(name.startswith("out.") for name in plain.state_dict())
    one, other = second(*inputs(), None, True)
    assert torch.equal(one, plain(*inputs())) and (one - other).abs().max() > 0.01


class Layouts(TorchDispatchMode):
    """Notes the images that convolutions, norms and poolings read and write, and their layout."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        if any(word in func.name() for word in ("convolution", "group_norm", "avg_pool")):
            for image in (args[0], out[0] if isinstance(out, tuple) else out):
                last = image.is_contiguous(memory_format=torch.channels_last)
                self.seen.append((func.name(), last))
        return out


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_images_stay_channels_last(precision: str) -> None:
    net = made(drop=0.2, precision=precision)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    x, c_noise = inputs()
    assert not x.is_contiguous(memory_format=torch.channels_last)
    with Layouts() as layouts:
        net(x, c_noise, torch.tensor(5))
    assert len(layouts.seen) > 100
    assert all(last for _, last in layouts.seen), [n for n, last in layouts.seen if not last]


def test_dropout_is_before_the_second_convolution_with_a_mask_for_each_block() -> None:
    net, key, p, seen = made(drop=0.5), torch.tensor(7), 0.5, []
    blocks = [m for m in net.modules() if isinstance(m, ddpmpp.Block)]
    for block in blocks:
        block.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(*inputs())
    net(*inputs(), key)
    plain, dropped = seen[: len(blocks)], seen[len(blocks) :]
    assert torch.equal(dropped[0], dropout(plain[0], p, key, 0))
    shares = [(d == 0).float().mean().item() for d in dropped]
    assert len(shares) == len(blocks) == 21 and all(abs(s - p) < 0.1 for s in shares)
    alike = [d == 0 for d in dropped if d.shape == dropped[0].shape]
    assert len(alike) == 5
    assert all((a != b).any() for a, b in itertools.combinations(alike, 2))
    assert torch.equal(net(*inputs()), made()(*inputs(), key))  # no key, or no share: no dropout
    assert torch.equal(net(*inputs(), key), net(*inputs(), key))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_compiles_as_one_graph_with_the_same_values_and_gradients(precision: str) -> None:
    results = []
    for compiles in (False, True):
        net = made(FEW, drop=0.3, precision=precision, head=True)
        if compiles:
            torch.compiler.reset()
            net.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        one, other = net(*inputs(4), torch.tensor(5), True)
        (one.square().sum() + other.sum()).backward()
        gradient = torch.cat([w.grad.flatten() for w in net.parameters()])
        results.append((one.detach(), other.detach(), gradient))
    for plain, compiled in zip(*results, strict=True):
        assert plain.norm() > 0
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4 * plain.norm().item())


@pytest.mark.parametrize(("half", "unit"), [("bfloat16", 2**-9), ("float16", 2**-12)])
def test_in_half_precision_products_are_rounded_and_the_label_is_not(
    half: str, unit: float
) -> None:
    exact, rounded = (made(precision=p) for p in ("float32", half))
    labels = []
    for name, module in rounded.named_modules():
        if name.startswith("map_") or name.endswith("affine"):
            module.register_forward_hook(lambda _, args, out: labels.append((*args, out)))
    x, c_noise = inputs(16)
    y, z = exact(x, c_noise), rounded(x, c_noise)
    assert z.dtype == torch.float32
    assert unit / 8 < ((y - z).norm() / y.norm()).item() < 16 * unit
    assert len(labels) == 23
    assert all(h.dtype == torch.float32 for pair in labels for h in pair)
    (z * x).sum().backward()
    assert all(w.grad.dtype == torch.float32 for w in rounded.parameters())


# --- in a study ---


@pytest.mark.parametrize(
    ("kind", "side", "reason"),
    [
        (subjects.DdpmPP(mult=(1, 2, 2, 2), attention=()), 28, "28 pixels a side can't be halved"),
        (subjects.DdpmPP(), 28, r"attention at \[16\]; on 28 x 28 images it has \[28, 14, 7\]"),
        (subjects.Unet(patch=3), 28, "patch 3 does not divide 28"),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_refused(
    kind: subjects.Network, side: int, reason: str
) -> None:
    with pytest.raises(StudyError, match=reason):
        build(kind, (1, side, side), 0.0, 0, "student")


def test_the_order_of_attention_is_no_difference() -> None:
    def told(*attention: int) -> factors.Factors:
        network = subjects.DdpmPP(attention=attention)
        budget = factors.Budget(images=128)
        return simplest(factors.Factors(data=subjects.Digits(), network=network, budget=budget))

    assert told(8, 16, 8) == told(16, 8) != told(16)
