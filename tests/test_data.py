"""Batches by address: the same stretch of the same stream, however it is cut."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from study import data
from study.data import Dataset, Draws, to_float, to_uint8
from study.subjects import Digits, Mixture

N = 300  # images of the numbered data set: epochs end inside batches and inside blocks
MIXTURE = Mixture(means=((-1.0, 0.0), (1.0, 0.5)), std=0.2)


def numbered() -> Dataset:
    """A data set whose image i is the number i."""
    train = torch.arange(N, dtype=torch.float32)[:, None]
    return Dataset(train, train, (1,), 1.0, "")


@pytest.fixture(scope="module")
def endless() -> Dataset:
    return data.load(MIXTURE)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load(Digits())


def joined(draws: Draws, cuts: list[int]) -> list[Tensor]:
    """x, z and u of consecutive batches that end at the cuts."""
    batches = [draws(a, b - a) for a, b in zip([0, *cuts], cuts, strict=False)]
    return [torch.cat([getattr(b, name) for b in batches]) for name in ("x", "z", "u")]


@pytest.mark.parametrize("kind", ["numbered", "endless"])
def test_batches_of_any_size_cut_the_same_stream(kind: str, endless: Dataset) -> None:
    dataset = {"numbered": numbered(), "endless": endless}[kind]
    small = joined(Draws(dataset, 0, "student", 0), list(range(64, 1281, 64)))
    large = joined(Draws(dataset, 0, "student", 0), list(range(128, 1281, 128)))
    odd = joined(Draws(dataset, 0, "student", 0), [7, 511, 512, 513, 1280])
    for a, b, c in zip(small, large, odd, strict=True):
        assert len(a) == 1280 and torch.equal(a, b) and torch.equal(a, c)


def test_any_batch_can_be_drawn_first(endless: Dataset) -> None:
    """A resumed run asks for a batch in the middle, and an old one again."""
    for dataset in (numbered(), endless):
        draws, resumed = (Draws(dataset, 0, "student", 0) for _ in range(2))
        through = [draws(start, 64) for start in range(0, 1280, 64)]
        for i in (13, 2, 19):
            batch = resumed(i * 64, 64)
            for name in ("x", "z", "u", "mask", "draw"):
                assert torch.equal(getattr(batch, name), getattr(through[i], name))


def test_epochs_are_different_permutations() -> None:
    x, *_ = joined(Draws(numbered(), 0, "student", 0), list(range(64, 4 * N + 1, 64)))
    epochs = x[: 4 * N, 0][: len(x) // N * N].view(-1, N)
    assert len(epochs) > 2
    assert torch.equal(epochs.sort(1).values, torch.arange(float(N)).expand_as(epochs))
    for a, b in zip(epochs, epochs[1:], strict=False):
        assert (a == b).sum() < 10  # one place in common is expected
        assert (a == torch.arange(N)).sum() < 10


@pytest.mark.parametrize("other", [(1, "student", 0), (0, "teacher", 0), (0, "student", 1)])
def test_streams_depend_on_seed_role_and_data_stream(other: tuple, endless: Dataset) -> None:
    for dataset in (numbered(), endless):
        one, same = Draws(dataset, 0, "student", 0)(0, N), Draws(dataset, 0, "student", 0)(0, N)
        apart = Draws(dataset, *other)(0, N)
        for name in ("x", "z", "u"):
            first = getattr(one, name)
            assert torch.equal(first, getattr(same, name))
            assert (first == getattr(apart, name)).double().mean() < 0.05
        assert one.mask == same.mask != apart.mask


def test_noise_and_times_are_standard_and_independent_of_the_data(endless: Dataset) -> None:
    n = 20_000
    batch = Draws(endless, 0, "student", 0)(0, n)
    assert batch.u.dtype == torch.float64 and batch.z.dtype == torch.float32
    assert stats.kstest(batch.u, "uniform").pvalue > 1e-3
    assert stats.kstest(batch.z.flatten(), "norm").pvalue > 1e-3
    columns = torch.cat([batch.x, batch.z, batch.u[:, None]], 1).double()
    correlation = torch.corrcoef(columns.T)[2:]  # x's own columns may correlate
    correlation = correlation.masked_fill(correlation > 1 - 1e-9, 0)
    assert correlation.abs().max() < 4 / n**0.5


def test_keys_differ_from_batch_to_batch_and_fit_31_bits() -> None:
    draws = Draws(numbered(), 0, "student", 0)
    keys = [int(draws(start, 64).mask) for start in range(0, 64 * 200, 64)]
    assert len(set(keys)) == 200
    assert 0 <= min(keys) and 2**30 < max(keys) < 2**31


def test_endless_data_never_repeat_and_follow_the_population(endless: Dataset) -> None:
    x = Draws(endless, 0, "student", 0)(0, 5000).x
    assert endless.train is None
    assert len(x.unique(dim=0)) == 5000
    share = (x[:, 0] > 0).double().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / 5000**0.5
    # std of x and y pooled about their common mean: Var = .2^2 + E[m^2] - (E m)^2
    assert endless.std == pytest.approx((0.04 + (1 + 1 + 0 + 0.25) / 4 - 0.125**2) ** 0.5)


def test_a_finite_mixture_is_one_fixed_sample() -> None:
    finite = Mixture(means=MIXTURE.means, std=MIXTURE.std, samples=400, held_out=500)
    one, same = data.load(finite), data.load(finite)
    assert one.train.shape == (400, 2) and one.held_out.shape == (500, 2)
    assert torch.equal(one.train, same.train) and one.digest == same.digest
    assert one.std == pytest.approx(one.train.double().std().item())
    assert torch.cdist(one.train, one.held_out).min() > 0  # the test sample is another one
    moved = data.load(Mixture(means=((-1.0, 0.0), (1.0, 0.6)), std=0.2, samples=400))
    assert moved.digest != one.digest != data.load(MIXTURE).digest
    assert data.load(MIXTURE).digest == data.load(MIXTURE).digest


def test_stds_and_weights_by_mode() -> None:
    dataset = data.load(
        Mixture(means=((-9.0,), (9.0,)), std=(0.1, 0.4), weights=(1.0, 3.0), held_out=20_000)
    )
    left = dataset.held_out[dataset.held_out < 0]
    assert abs(len(left) / 20_000 - 0.25) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    assert left.std().item() == pytest.approx(0.1, rel=0.05)
    assert dataset.held_out[dataset.held_out > 0].std().item() == pytest.approx(0.4, rel=0.05)


def test_every_pixel_value_survives_the_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    x = to_float(values)
    assert (x[0], x[255]) == (-1, 1) and x.dtype == torch.float32
    assert torch.equal(to_uint8(x), values)
    assert torch.equal(to_uint8(x + 0.45 / 127.5), values)  # the nearest value, not the one below
    assert to_uint8(torch.tensor([-3.0, 1.02, 7.0])).tolist() == [0, 255, 255]
    assert to_float(x) is x


def test_digits(digits: Dataset) -> None:
    assert digits.train.shape == (997, 1, 8, 8) and digits.held_out.shape == (400, 1, 8, 8)
    assert digits.images and digits.shape == (1, 8, 8) and digits.density is None
    assert digits.std == pytest.approx(0.75, abs=0.02)
    assert digits.std == pytest.approx(float(to_float(digits.train).std()), rel=1e-5)
    overlap = torch.cdist(to_float(digits.train).flatten(1), to_float(digits.held_out).flatten(1))
    assert overlap.min() > 0
    batch = Draws(digits, 0, "student", 0)(0, 997)
    assert batch.x.dtype == torch.float32 and batch.z.shape == batch.x.shape == (997, 1, 8, 8)
    assert torch.equal(to_uint8(batch.x).unique(dim=0), digits.train.unique(dim=0))


def test_moving_a_data_set_keeps_what_it_is(endless: Dataset) -> None:
    moved = replace(endless, digest="d").to(torch.device("cpu"))
    assert (moved.digest, moved.std, moved.shape) == ("d", endless.std, endless.shape)
    assert moved.train is None and torch.equal(moved.density.means, endless.density.means)
