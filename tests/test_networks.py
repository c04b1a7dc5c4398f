"""Networks: shapes, weights by address, and dropout masks as independent as they must be."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from study import kernels, networks
from study.networks import build, doubled, dropout
from study.subjects import Mlp, Network, Unet

SIZES = 1 << 16
KINDS = [
    Mlp(width=8, depth=2),
    Unet(width=4, levels=3),
    Unet(width=8, levels=2, blocks=2),
    Unet(width=4, levels=1),
]


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network with every parameter random: none of its parts is switched off."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def inputs(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 7, 7), (1, 8, 8), (1, 28, 28)])
def test_any_square_image(kind: Network, shape: tuple[int, ...]) -> None:
    net = build(kind, shape, 0.0, 0, "student")
    x, c_noise = inputs(2, *shape)
    assert torch.equal(net(x, c_noise), torch.zeros(2, *shape))  # the output layer starts at 0
    y = randomised(net)(x, c_noise)
    assert y.shape == x.shape and y.isfinite().all()
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())  # no part is idle


@pytest.mark.parametrize("size", [1, 2, 6])
def test_mlp_of_vectors(size: int) -> None:
    net = randomised(build(Mlp(), (size,), 0.0, 0, "student"))
    x, c_noise = inputs(4, size)
    assert net(x, c_noise).shape == (4, size)
    alone = net(x[2:3], c_noise[2:3])
    torch.testing.assert_close(net(x, c_noise)[2:3], alone, rtol=1e-4, atol=1e-4)  # rows don't mix


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_output_depends_on_the_noise_label(kind: Network) -> None:
    net = randomised(build(kind, (1, 8, 8), 0.0, 0, "student"))
    x, c_noise = inputs(2, 1, 8, 8)
    assert (net(x, c_noise) - net(x, c_noise + 0.1)).abs().max() > 1e-4


@pytest.mark.parametrize("width", range(4, 133, 4))
def test_every_width_that_the_factors_allow_can_be_built(width: int) -> None:
    norms = [m for m in build(Unet(width=width), (1, 8, 8), 0.0, 0, "").modules()
             if isinstance(m, nn.GroupNorm)]  # fmt: skip
    assert all(n.num_channels // n.num_groups >= 4 and n.num_groups <= 32 for n in norms)


def test_weights_are_addressed_by_seed_role_and_name() -> None:
    def weights(seed: int, role: str) -> dict[str, Tensor]:
        return dict(build(Unet(width=8), (1, 8, 8), 0.0, seed, role).named_parameters())

    torch.manual_seed(0)
    first = weights(3, "student")
    build(Mlp(), (5,), 0.0, 3, "student")  # another network, and the global stream moves on
    torch.randn(10)
    again, teacher, other = weights(3, "student"), weights(3, "teacher"), weights(4, "student")
    drawn = [n for n, w in first.items() if w.ndim > 1 and not n.startswith("out.")]
    assert len(drawn) > 8
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, teacher[name]) == torch.equal(weight, other[name])
        assert torch.equal(weight, teacher[name]) == (name not in drawn)
    values = [first[n].flatten()[:8] for n in drawn]
    assert all((a - b).abs().min() > 0 for a, b in itertools.combinations(values, 2))


def test_weights_of_an_address_stay_what_they_are() -> None:
    """Finished runs were started from them."""
    first = {
        Mlp(width=8, depth=2): {"inp": (-0.308742, 0.463823), "hidden.1": (0.136455, -0.12542)},
        Unet(width=8): {
            "inp": (-0.178253, 0.267788),
            "down.0.0.conv0": (0.041761, 0.063429),
            "down.1.0.conv1": (-0.024677, 0.137428),
        },
    }
    for kind, layers in first.items():
        shape = (3,) if isinstance(kind, Mlp) else (1, 8, 8)
        state = build(kind, shape, 0.0, 3, "student").state_dict()
        for name, values in layers.items():
            weight = state[f"{name}.weight"].contiguous().flatten()[:2]
            assert weight.tolist() == pytest.approx(values, abs=2e-6)


def test_weights_have_variance_one_over_fan_in() -> None:
    net = build(Mlp(width=256, depth=2), (40,), 0.0, 0, "student")
    for layer, fan_in in [(net.inp, 40), (net.hidden[0], 256), (net.time[1], 64)]:
        weight = layer.weight.detach()
        error = weight.std().item() * math.sqrt(fan_in) - 1
        assert abs(error) < 4 / math.sqrt(2 * weight.numel())
        assert layer.bias.abs().max() == 0


def test_convolutions_run_channels_last() -> None:
    net, seen = build(Unet(width=8), (3, 7, 7), 0.2, 0, "student"), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(*inputs(2, 3, 7, 7), torch.tensor(5))
    assert len(seen) > 8
    assert all(h.is_contiguous(memory_format=torch.channels_last) for h in seen)


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 4, 5, 7), (1, 1, 3, 2), (3, 8, 4, 4)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_doubled_is_torchs_nearest_interpolation(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(shape, generator=generator).to(memory_format=layout)
    upstream = torch.randn(*shape[:2], 2 * shape[2], 2 * shape[3], generator=generator)
    results = []
    for function in (doubled, lambda h: F.interpolate(h, scale_factor=2.0, mode="nearest")):
        leaf = h.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf)
        y.backward(upstream)
        results.append((y.detach(), leaf.grad))
    (value, gradient), (expected, expected_gradient) = results
    assert torch.equal(value, expected)
    if shape[2:] != (1, 1):  # a single pixel is only viewed
        assert value.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


# --- precision ---


@pytest.mark.parametrize(("half", "unit"), [("bfloat16", 2**-9), ("float16", 2**-12)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_half_precision_rounds_the_products_and_nothing_outside(
    kind: Network, half: str, unit: float
) -> None:
    found = {}
    for precision in ("float32", half):
        net = build(kind, (3, 8, 8), 0.0, 0, "student", precision)
        generator = torch.Generator().manual_seed(0)
        net.out.weight.data.normal_(generator=generator)
        x, c_noise = inputs(16, 3, 8, 8)
        y = net(x, c_noise)
        assert y.dtype == torch.float32 and y.shape == x.shape
        (y * inputs(16, 3, 8, 8, seed=1)[0]).sum().backward()
        assert all(w.dtype == w.grad.dtype == torch.float32 for w in net.parameters())
        gradient = torch.cat([w.grad.flatten() for w in net.parameters()])
        found[precision] = y.detach(), gradient
    for exact, rounded in zip(found["float32"], found[half], strict=True):
        error = ((rounded - exact).norm() / exact.norm()).item()
        assert unit / 8 < error < 16 * unit  # unit: a product's relative rounding


def test_weights_are_the_same_in_either_precision() -> None:
    one, other = (
        build(Unet(width=8), (1, 8, 8), 0.0, 3, "student", p).state_dict()
        for p in ("float32", "float16")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- dropout ---


def mask(p: float, key: int, layer: int, n: int = SIZES) -> Tensor:
    return dropout(torch.ones(n), p, torch.tensor(key), layer)


def standard(kept: Tensor) -> Tensor:
    """A mask with mean 0 and variance 1."""
    kept = kept.double()
    return (kept - kept.mean()) / kept.std()


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """Of two standard masks at every cyclic shift, in standard errors."""
    product = torch.fft.rfft(a) * torch.fft.rfft(b).conj()
    return torch.fft.irfft(product, n=len(a)) / math.sqrt(len(a))


KEYS = [0, 1, 3, 4, 1 << 16, 1 << 30, 123_456_789, 2**31 - 1]


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_expectation(p: float) -> None:
    for key, layer in itertools.product(KEYS, (0, 1, 7)):
        dropped = mask(p, key, layer)
        assert dropped.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-6)
        error = math.sqrt(p / (1 - p) / SIZES)  # standard error of the mean of mask / (1 - p)
        assert abs(dropped.mean().item() - 1) < 4 * error


def test_mask_is_a_function_of_key_layer_and_position() -> None:
    assert torch.equal(mask(0.3, 5, 1), mask(0.3, 5, 1))
    image = torch.ones(4, 8, 5, 5)
    plain = dropout(image, 0.3, torch.tensor(5), 1)
    last = dropout(image.contiguous(memory_format=torch.channels_last), 0.3, torch.tensor(5), 1)
    assert torch.equal(plain, last)  # whatever the layout in memory
    assert torch.equal(plain.flatten(), mask(0.3, 5, 1, 800))  # no position repeats another's


def test_masks_of_other_keys_and_layers_are_uncorrelated_at_every_shift() -> None:
    masks = [standard(mask(0.5, key, layer)) for key in KEYS for layer in (0, 1, 2)]
    for a, b in itertools.combinations(masks, 2):
        assert correlations(a, b).abs().max() < 6.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_positions_of_one_mask_are_uncorrelated(p: float) -> None:
    for key in KEYS:
        one = standard(mask(p, key, 0, 1 << 18))
        assert correlations(one, one)[1:].abs().max() < 6.5


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dropout_in_the_networks(kind: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomised(build(kind, (1, 8, 8), 0.5, 0, "student"))
    without = randomised(build(kind, (1, 8, 8), 0.0, 0, "student"))
    x, c_noise = inputs(2, 1, 8, 8)
    key, other = torch.tensor(1), torch.tensor(2)
    assert torch.equal(net(x, c_noise), without(x, c_noise))  # no key, no dropout
    assert torch.equal(without(x, c_noise, key), without(x, c_noise))
    assert torch.equal(net(x, c_noise, key), net(x, c_noise, key))
    outputs = [net(x, c_noise), net(x, c_noise, key), net(x, c_noise, other)]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(outputs, 2))

    layers = []
    original = networks.dropout

    def noted(h: Tensor, p: float, key: Tensor | None, layer: int) -> Tensor:
        layers.append(layer)
        return original(h, p, key, layer)

    for module in (networks, kernels):
        monkeypatch.setattr(module, "dropout", noted)
    net(x, c_noise, key)
    assert len(set(layers)) == len(layers) > 1  # each layer has a mask of its own
