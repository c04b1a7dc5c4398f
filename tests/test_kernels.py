"""The fused kernels against torch's own functions in float64: natively on a GPU, elsewhere in
Triton's interpreter."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from study import kernels, networks, noise
from study.subjects import DdpmPP, Unet

pytest.importorskip("triton", reason="the fused kernels are written in Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
SHAPES = {  # B, C, H, W, groups
    "groups of 4, odd image": (2, 24, 7, 7, 6),
    "groups of 16": (1, 96, 5, 4, 6),
    "groups of 5": (3, 20, 4, 4, 4),
    "one group of many": (1, 48, 3, 2, 1),
    "a slab cut short": (2, 48, 2, 5, 12),
    "one pixel": (2, 32, 1, 1, 8),
    "several tiles": (1, 16, 34, 33, 4),
}
ARGUMENTS = {
    "alone": (),
    "bias": ("bias",),
    "embedding": ("e",),
    "affine": ("scale", "shift"),
    "all": ("e", "scale", "shift"),
}
Leaves = dict[str, Tensor]


def leaves(shape: tuple[int, ...], names: tuple[str, ...] = ARGUMENTS["all"]) -> Leaves:
    """x, weights and what is asked for, in float32; x has another mean in every channel."""
    B, C, H, W, _ = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made = {"x": normal(B, C, H, W) * 1.5 + 2 * normal(C, 1, 1), "w": normal(C), "b": normal(C)}
    both = normal(B, 2 * C)
    more = {"e": normal(B, C), "bias": normal(C), "scale": both[:, :C], "shift": both[:, C:]}
    made |= {name: more[name] for name in names}
    return {name: value.to(DEVICE) for name, value in made.items()}


def exact(groups: int, x: Tensor, w: Tensor, b: Tensor, **more: Tensor) -> Tensor:
    """The definition, spelt out per group."""
    e, scale, shift = (more.get(k) for k in ("e", "scale", "shift"))
    e = more.get("bias", e)
    h = x if e is None else x + e[..., None, None]
    h = h.unflatten(1, (groups, -1))
    h = (h - h.mean((2, 3, 4), keepdim=True)) / (
        h.var((2, 3, 4), correction=0, keepdim=True) + EPS
    ).sqrt()
    h = h.flatten(1, 2) * w[:, None, None] + b[:, None, None]
    if scale is not None:
        h = h * (1 + scale[..., None, None]) + shift[..., None, None]
    return h * h.sigmoid() if more.get("silu", True) else h


def ours(
    groups: int, fused: bool, x: Tensor, w: Tensor, b: Tensor, **more: Tensor | float
) -> Tensor:
    e = more.pop("bias", None) if "bias" in more else more.pop("e", None)
    return kernels.norm_silu(x, w, b, groups, EPS, e, fused=fused, **more)


def derived(
    function: Callable[..., Tensor],
    given: Leaves,
    dtype: torch.dtype,
    upstream: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The function's value and gradients, with x in `dtype`, for one upstream gradient that is
    rounded to `upstream`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {k: v.to(dtype if k in ("x", "skip") else wide) for k, v in given.items()}
    inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    values = function(**inputs)
    values = values if isinstance(values, tuple) else (values,)
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(v.shape, generator=generator).to(upstream).to(v) for v in values]
    return [*values, *torch.autograd.grad(values, list(inputs.values()), slopes)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """|found - expected| / |expected| of each."""
    return [
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("names", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradients(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    groups, given = shape[-1], leaves(shape, names)
    expected = derived(lambda **k: exact(groups, **k), given, torch.float64)
    for fused in (True, False):
        found = derived(lambda fused=fused, **k: ours(groups, fused, **k), given, torch.float32)
        assert all(a.shape == b.shape for a, b in zip(found, expected, strict=True))
        assert found[0].is_contiguous(memory_format=torch.channels_last) or not fused
        if shape[2:4] == (1, 1) and "e" not in names:
            continue  # x and e are tested together below; a gradient may be close to nothing
        assert max(errors(found, expected)) < 3e-6


def test_norm_without_silu() -> None:
    given, no = leaves(SHAPES["several tiles"]), {"silu": False}
    expected = derived(lambda **k: exact(4, **k, **no), given, torch.float64)
    for fused in (True, False):
        found = derived(lambda fused=fused, **k: ours(4, fused, **k, **no), given, torch.float32)
        assert max(errors(found, expected)) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    given = leaves(SHAPES["several tiles"])
    given["x"] = given["x"].to(dtype)  # what is in memory is taken as exact
    expected = derived(lambda **k: exact(4, **k), given, torch.float64, dtype)
    found = derived(lambda **k: ours(4, True, **k), given, dtype, dtype)
    # the usual way: the norm in float32, its result rounded
    usual = derived(lambda x, **k: ours(4, False, x=x.float(), **k).to(dtype), given, dtype, dtype)
    assert found[0].dtype == found[1].dtype == dtype
    cut = DEVICE.type == "cpu" and dtype == torch.bfloat16  # the interpreter doesn't round these
    for mine, theirs in zip(errors(found, expected), errors(usual, expected), strict=True):
        assert mine < (2.2 if cut else 1.05) * theirs + 3e-7


def test_a_mean_far_from_zero_costs_no_more_than_its_rounding() -> None:
    given = leaves(SHAPES["several tiles"], ("e",))
    given["x"], given["e"] = given["x"] + 300, given["e"] * 100
    expected = derived(lambda **k: exact(4, **k), given, torch.float64)
    found = derived(lambda **k: ours(4, True, **k), given, torch.float32)
    assert max(errors(found, expected)) < 300 * 2**-24 * 3


@pytest.mark.parametrize(("gain", "silu"), [(1.0, True), (0.5**0.5, True), (0.5**0.5, False)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_residual_sum_before_the_norm(shape: tuple[int, ...], gain: float, silu: bool) -> None:
    groups = shape[-1]
    given = leaves(shape, ("bias",))
    given["skip"] = given["x"].flip(1) - 0.3 * given["x"].square()

    def joined(
        x: Tensor, w: Tensor, b: Tensor, bias: Tensor, skip: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = (x + bias[:, None, None] + skip) * gain
        return z, exact(groups, z, w, b, silu=silu)

    def made(
        fused: bool, x: Tensor, w: Tensor, b: Tensor, bias: Tensor, skip: Tensor
    ) -> tuple[Tensor, Tensor]:
        return kernels.add_norm_silu(x, skip, w, b, groups, EPS, bias, gain, silu, fused)

    expected = derived(joined, given, torch.float64)
    for fused in (True, False):
        found = derived(lambda fused=fused, **k: made(fused, **k), given, torch.float32)
        assert max(errors(found, expected)) < 3e-6


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_of_the_two_results(used: int) -> None:
    shape = SHAPES["groups of 4, odd image"]
    given = leaves(shape, ())
    found = {}
    for fused in (True, False):

        def one(x: Tensor, w: Tensor, b: Tensor, fused: bool = fused) -> Tensor:
            around = w, b, shape[-1], EPS, None, 0.7
            values = kernels.add_norm_silu(x, x.tanh(), *around, fused=fused)
            return values[used] + 0 * (w + b)[:, None, None]

        found[fused] = derived(one, given, torch.float32)
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_is_the_mask_of_key_layer_and_position() -> None:
    shape = SHAPES["several tiles"]
    given, key, layer = leaves(shape), torch.tensor(123_456_789, device=DEVICE), 7

    def dropped(**k: Tensor) -> Tensor:
        return ours(4, True, **k, p=0.3, key=key, layer=layer)

    expected = derived(
        lambda **k: noise.dropout(exact(4, **k), 0.3, key, layer), given, torch.float64
    )
    found = derived(dropped, given, torch.float32)
    assert torch.equal(found[0] == 0, expected[0] == 0)
    assert 0.25 < (found[0] == 0).double().mean() < 0.35
    assert max(errors(found, expected)) < 3e-6


def test_the_same_bits_every_time() -> None:
    given = leaves(SHAPES["several tiles"])
    first, again = (derived(lambda **k: ours(4, True, **k), given, torch.float32) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_layout_of_the_input_does_not_matter() -> None:
    given = leaves(SHAPES["groups of 4, odd image"])
    last = given | {"x": given["x"].contiguous(memory_format=torch.channels_last)}
    found = [derived(lambda **k: ours(6, True, **k), g, torch.float32) for g in (given, last)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_second_derivatives_are_refused_not_wrong() -> None:
    given = {k: v.requires_grad_() for k, v in leaves(SHAPES["groups of 5"], ()).items()}
    loss = ours(4, True, **given).square().sum()
    (slope,) = torch.autograd.grad(loss, given["x"], create_graph=True)
    with pytest.raises(RuntimeError):
        slope.square().sum().backward()


def test_operators_keep_torchs_contract() -> None:
    given = leaves(SHAPES["groups of 5"])
    x = given["x"].contiguous(memory_format=torch.channels_last).requires_grad_()
    w, b, e, scale, shift = (given[k].requires_grad_() for k in ("w", "b", "e", "scale", "shift"))
    key = torch.tensor(3, device=DEVICE)
    numbers = 4, EPS, 0.7, 0.2, 3, True
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for arguments in ((x, None, e, w, b, scale, shift, key), (x, x, e, w, b, None, None, None)):
        torch.library.opcheck(torch.ops.study.norm_silu, (*arguments, *numbers), test_utils=checks)


# --- in the network ---


NETWORKS = {
    "one resolution": Unet(width=8, levels=1, blocks=2),
    "two resolutions": Unet(width=8, levels=2),
    "ddpm++": DdpmPP(width=8, mult=(1, 2), blocks=1, attention=(2,)),
}


def network(name: str) -> networks.Network:
    net = networks.build(NETWORKS[name], (1, 4, 4), 0.2, 0, "")
    generator = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        weight.data.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return net.to(DEVICE)


def images() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, c_noise = torch.randn(2, 1, 4, 4, generator=generator), torch.tensor([-0.5, 0.7])
    return x.to(DEVICE), c_noise.to(DEVICE), torch.tensor(5, device=DEVICE)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_is_the_network(name: str) -> None:
    net, found = network(name), {}
    for fused in (True, False):
        net.zero_grad()
        y = net.out(net.trunk(*images(), fused=fused))
        y.square().mean().backward()
        found[fused] = [y.detach(), *(w.grad.clone() for w in net.parameters())]
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_fused_network_is_one_graph() -> None:
    net = network("one resolution")

    def trunk(x: Tensor, c_noise: Tensor, key: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return net.out(net.trunk(x, c_noise, key, fused=True))

    whole = torch.compile(trunk, fullgraph=True, dynamic=False, backend="aot_eager")
    found = {}
    for name, function in (("written", trunk), ("compiled", whole)):
        net.zero_grad()
        y = function(*images())
        y.float().square().mean().backward()
        found[name] = [y.detach(), *(w.grad.clone() for w in net.parameters())]
    assert found["written"][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


def test_the_body_can_be_differentiated_forward() -> None:
    net, (x, c_noise, key) = network("two resolutions"), images()
    h = torch.randn_like(x)
    _, rise = torch.func.jvp(lambda y: net.body(y, c_noise, key), (x,), (h,))
    step = 1e-2
    difference = (net.body(x + step * h, c_noise, key) - net.body(x - step * h, c_noise, key)) / (
        2 * step
    )
    torch.testing.assert_close(rise, difference, rtol=0.02, atol=2e-3)


# --- on the GPU's own compiler ---

BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from study import tiles
kinds = {"key": "*i64", "stream": "i32", "gain": "fp32", "eps": "fp32"}
kinds |= {name: "i32" for name in ("e_row", "scale_row", "shift_row")}
kinds |= {name: "*bf16" for name in ("x", "skip", "y", "z", "dy", "dz", "dx", "scale", "shift")}
for kernel, way in ((tiles.forward, "sum"), (tiles.backward, "backward")):
    for C, D, pixels in ((256, 8, 1024), (20, 5, 49)):
        t = tiles.tiling(pixels, D, 2, way)
        fixed = dict(C=C, D=D, HW=pixels, LEAST=1 << 31, KEPT=0.5, SILU=True, K=t.K, S=t.S, P=t.P)
        names = kernel.arg_names
        signature = {n: "constexpr" if n in fixed else kinds.get(n, "*fp32") for n in names}
        constants = {(names.index(n),): value for n, value in fixed.items()}
        limits = {"num_warps": t.warps, "maxnreg": t.registers}
        made = triton.compile(ASTSource(kernel, signature, constants),
                              target=GPUTarget("cuda", 90, 32), options=limits)
        assert made.asm["cubin"]
print("built")
"""


def test_kernels_are_built_for_a_gpu_without_one(tmp_path: object) -> None:
    place = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, env=place)
    assert done.stdout.strip() == "built", done.stderr


def test_tiles_hold_whole_groups() -> None:
    from study import tiles

    ways = "forward", "sum", "backward"
    for group in range(1, 200):
        for pixels, itemsize, way in itertools.product((1, 49, 1024, 4096), (2, 4), ways):
            t = tiles.tiling(pixels, group, itemsize, way)
            assert t.K >= 1 and t.K * group <= t.S < 2 * t.K * group + 2 * group
            assert t.S * itemsize >= 64 and t.P >= 1 and 1 <= t.warps <= 16
            assert t.warps * 32 * t.registers <= 65536  # what a multiprocessor has
