"""Random numbers inside the step against their laws, at fixed keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from study import noise
from study.mixtures import chosen

N = 1 << 18
KEYS = [0, 5, 2**31 - 1]
STREAMS = [2001, 2002, 3000, 3001, 3002, 3003, 3004, 3010, 3011]  # those the scores use
LAWS = {"uniform": stats.uniform(), "normal": stats.norm(), "exponential": stats.expon()}
LAST = noise.WORD

Draw = Callable[..., Tensor]


def key(number: int) -> Tensor:
    return torch.tensor(number)


def z_scores(products: Tensor) -> Tensor:
    """Means over the last dimension in standard errors."""
    return products.mean(-1) / (products.std(-1) / math.sqrt(products.shape[-1]))


def forms(x: Tensor) -> list[Tensor]:
    """Of normal numbers (..., n): themselves and their distance from 0, both of mean 0."""
    return [x, x.abs() - math.sqrt(2 / math.pi)]


# --- laws ---


@pytest.mark.parametrize("stream", [0, 2001])
@pytest.mark.parametrize("number", KEYS)
@pytest.mark.parametrize("name", LAWS)
def test_numbers_have_their_law(name: str, number: int, stream: int) -> None:
    """Kolmogorov-Smirnov, and the first four moments within their standard errors."""
    x, law = getattr(noise, name)(key(number), stream, (N,)).double().numpy(), LAWS[name]
    assert stats.kstest(x, law.cdf).pvalue > 1e-3
    for power in (1, 2, 3, 4):
        error = math.sqrt((law.moment(2 * power) - law.moment(power) ** 2) / N)
        assert abs(np.mean(x**power) - law.moment(power)) < 4 * error


@pytest.mark.parametrize("number", KEYS)
def test_every_bit_of_a_word_is_fair_and_no_word_comes_twice(number: int) -> None:
    words = noise.words(key(number), 7, (N,))
    assert words.dtype == torch.int64 and words.min() >= 0 and words.max() <= LAST
    assert len(words.unique()) == N  # positions are permuted, not thrown together
    bits = (words >> torch.arange(32)[:, None]) & 1
    assert (bits.double().mean(1) - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("name", LAWS)
def test_tails_are_as_heavy_as_they_should_be(name: str) -> None:
    """Counts beyond quantiles of 1e-2 .. 1e-4 on either side, Poisson within 4.5 sd."""
    x, law, n = getattr(noise, name)(key(11), 3, (1 << 20,)).double().numpy(), LAWS[name], 1 << 20
    for share in (1e-2, 1e-3, 1e-4):
        for count in ((x < law.ppf(share)).sum(), (x > law.isf(share)).sum()):
            assert abs(count - n * share) < 4.5 * math.sqrt(n * share)


# --- extremes ---


def made_of(words: list[int], draw: Draw, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(noise, "words", lambda *_: torch.tensor(words))
    return draw(key(0), 0, (len(words),))


@pytest.mark.parametrize("name", LAWS)
def test_no_word_makes_an_infinity(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [*range(600), *range(LAST - 600, LAST + 1), 2**31 - 1, 2**31]
    x = made_of(ends, getattr(noise, name), monkeypatch)
    assert x.dtype == torch.float32 and x.isfinite().all()
    if name == "uniform":
        assert 0 < x.min() and x.max() < 1
    elif name == "normal":
        assert 5.2 < x.max() < 5.3 and x.min() == -x.max()
    else:
        assert 0 < x.min() and 16 < x.max() < 17.5


def test_exponential_numbers_are_fine_near_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least word stands for 2^-33, and close to 0 -ln(1 - u) is u."""
    words = [0, 1, 2, 10, 1000]
    found = made_of(words, noise.exponential, monkeypatch).double()
    expected = (torch.tensor(words).double() + 0.5) / 2.0**32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


# --- independence ---


def test_streams_are_independent() -> None:
    x = torch.stack([noise.normal(key(77), s, (N,)) for s in STREAMS]).double()
    pairs = torch.triu_indices(len(STREAMS), len(STREAMS), 1)
    for values in forms(x):
        assert z_scores(values[pairs[0]] * values[pairs[1]]).abs().max() < 4.5


def test_keys_are_independent_however_alike() -> None:
    """Keys that differ by one, by one bit, and in the sign bit of 32."""
    keys = [0, 1, 2, 3, 4, 1000, 1001, 1 << 16, 1 << 30, (1 << 31) - 1]
    x = torch.stack([noise.normal(key(k), 3001, (N,)) for k in keys]).double()
    pairs = torch.triu_indices(len(keys), len(keys), 1)
    for values in forms(x):
        assert z_scores(values[pairs[0]] * values[pairs[1]]).abs().max() < 4.5


def test_no_key_or_stream_is_another_ones_sequence_from_further_on() -> None:
    """Words in common, at whatever position, are few: by chance n^2 / 2^32 = 4 for a pair."""
    n, asked = 1 << 17, [(0, 1), (1, 1), (2, 1), (1000, 1), (1, 2), (1, 3), (2, 3)]
    sets = [noise.words(key(k), stream, (n,)).unique() for k, stream in asked]
    for i, words in enumerate(sets):
        for other in sets[:i]:
            assert torch.isin(words, other).sum() < n / 1000


def test_one_bit_of_the_key_turns_every_high_bit_of_a_word_half_the_time() -> None:
    """Averaged over keys; low bits are not asked, nothing may choose by them."""
    n, some = 4096, [5, 12_345, 999_999_937, 2**31 - 1]
    for bit in range(31):
        turned = torch.stack(
            [noise.words(key(k), 9, (n,)) ^ noise.words(key(k ^ 1 << bit), 9, (n,)) for k in some]
        ).flatten()
        share = ((turned >> torch.arange(16, 32)[:, None]) & 1).double().mean(1)
        assert (share - 0.5).abs().max() < 0.03  # 16 384 pairs: 0.004 is one standard error


@pytest.mark.parametrize("number", KEYS)
def test_neighbouring_positions_are_independent(number: int) -> None:
    x = noise.normal(key(number), 3001, (N,)).double()
    for values in forms(x):
        for lag in (1, 2, 3, 4, 7, 8, 16, 64, 100, 784, 1024, 3072, 65_536):
            assert abs(z_scores(values[:-lag] * values[lag:])) < 4.5


@pytest.mark.parametrize("lag", [1, 16, 3072])
def test_pairs_of_neighbours_fill_the_square(lag: int) -> None:
    """Chi-square of (u_i, u_i+lag) on 32 x 32 boxes."""
    u = (noise.uniform(key(3), 1, (N,)) * 32).long()
    counts = torch.bincount(u[:-lag] * 32 + u[lag:], minlength=1024).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3


# --- addresses ---


@pytest.mark.parametrize("draw", [noise.words, noise.uniform, noise.normal, noise.exponential])
def test_start_continues_the_same_numbers(draw: Draw) -> None:
    """A tensor made in pieces of rows is the tensor made at once."""
    whole = draw(key(8), 2, (7, 3, 5))
    pieces = [draw(key(8), 2, (rows, 3, 5), at * 15) for at, rows in ((0, 2), (2, 1), (3, 4))]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(draw(key(8), 2, (105,)).view(7, 3, 5), whole)  # shape plays no part
    assert torch.equal(draw(key(8), 2, (7, 3, 5)), whole)
    assert not torch.equal(draw(key(8), 2, (7, 3, 5), 1), whole)


@pytest.mark.parametrize("draw", [noise.words, noise.uniform, noise.normal, noise.exponential])
def test_nothing_may_be_asked_for(draw: Draw) -> None:
    assert draw(key(8), 2, (0, 3)).shape == (0, 3)


def test_a_key_filled_anew_draws_afresh() -> None:
    held = torch.full((), 4)
    first = noise.normal(held, 1, (9,))
    held.fill_(5)
    assert torch.equal(noise.normal(held, 1, (9,)), noise.normal(key(5), 1, (9,)))
    held.fill_(4)
    assert torch.equal(noise.normal(held, 1, (9,)), first)


# --- the race ---


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, 1.0],
        [0.5, 0.3, 0.15, 0.05],
        [1e-3, 1.0, 1e-2, 0.0, 2.0],
        [1.0] * 50,
        [3e-30, 1e-30],
    ],
    ids=lambda w: f"{len(w)} weights from {w[0]}",
)
def test_race_draws_each_with_its_probability(weights: list[float]) -> None:
    """The least E_i / w_i is at i with probability w_i / sum w; at 0 it never is."""
    n, w = 200_000, torch.tensor(weights)
    race = noise.exponential(key(21), 4, (n, len(w))) / w
    counts = torch.bincount(race.argmin(1), minlength=len(w)).numpy()
    share = np.array(weights) / np.sum(weights)
    assert (counts[share == 0] == 0).all()
    held = share > 0
    assert stats.chisquare(counts[held], n * share[held]).pvalue > 1e-3
    least = race.amin(1).double() * w.sum().item()
    assert stats.kstest(least, LAWS["exponential"].cdf).pvalue > 1e-3


def test_races_of_rows_and_draws_are_apart() -> None:
    """chosen: k draws for each row by its own weights, independent among draws and rows."""
    n, k = 50_000, 3
    weights = torch.tensor([[0.2, 0.8], [0.7, 0.3]]).repeat(n, 1)
    picks = chosen(weights, key(6), k)  # (k, 2 n)
    assert picks.shape == (k, 2 * n)
    first = picks.view(k, n, 2).double() - torch.tensor([0.8, 0.3]).double()
    assert z_scores(first.transpose(1, 2)).abs().max() < 4.5
    columns = first.permute(0, 2, 1).reshape(2 * k, n)  # every draw of every kind of row
    pairs = torch.triu_indices(2 * k, 2 * k, 1)
    assert z_scores(columns[pairs[0]] * columns[pairs[1]]).abs().max() < 4.5
