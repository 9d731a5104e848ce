"""Stochastic rounding against float64 and the table of bfloat16 numbers; the hash by its statistics."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nai_xl.optimizer.rounding import (
    further_words,
    mix,
    parameter_words,
    random_words,
    round_to_bf16,
    step_keys,
)

ALL_BITS = torch.arange(65536)
finite = st.floats(-(2.0**126), 2.0**126, width=32)


def key(seed: int = 0, number: int = 0, step: int = 1) -> Tensor:
    return step_keys(torch.tensor([parameter_words(seed, number)]), torch.tensor([float(step)]))[0]


def neighbours(x: float) -> tuple[float, float]:
    """The bfloat16 numbers next to x, from float64 arithmetic: 8 significant bits, exponents from -126."""
    if x == 0:
        return 0.0, 0.0
    spacing = 2.0 ** (max(math.frexp(abs(x))[1] - 1, -126) - 7)
    return math.floor(x / spacing) * spacing, math.ceil(x / spacing) * spacing


@settings(deadline=None, max_examples=50)
@given(x=finite)
def test_only_the_two_neighbours_and_the_mean_over_all_bits_is_the_number_itself(x: float) -> None:
    found = round_to_bf16(torch.tensor(x).expand(65536).contiguous(), ALL_BITS).double()
    assert set(found.tolist()) <= set(neighbours(x))
    assert found.mean().item() == pytest.approx(x, rel=1e-12)  # every outcome of 16 random bits once: the expectation


@settings(deadline=None, max_examples=50)
@given(x=finite, bits=st.integers(0, 65535))
def test_a_number_that_bfloat16_holds_stays(x: float, bits: int) -> None:
    held = torch.tensor([x]).bfloat16()
    assume(held.isfinite().item())
    assert round_to_bf16(held.float(), torch.tensor([bits])).equal(held)


@pytest.mark.parametrize("bits", [0, 1, 65535])
def test_infinities_and_nan_stay_what_they_are(bits: int) -> None:
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # to which adding bits would overflow
    x = torch.cat([torch.tensor([math.inf, -math.inf]), nan])
    found = round_to_bf16(x, torch.full((3,), bits))
    assert found[:2].tolist() == [math.inf, -math.inf] and found[2].isnan()


def test_the_words_have_the_statistics_of_fair_bits() -> None:
    """Each of the 48 bits is 1 half of the time, and no two of them know of each other; 5 standard deviations."""
    count = 1 << 18
    words = random_words(key(), count)
    more = further_words(words)
    bits = torch.stack([words >> i & 1 for i in range(32)] + [more >> i & 1 for i in range(16)]).double()
    correlation = torch.corrcoef(bits) - torch.eye(48)
    assert (bits.mean(1) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(count)
    assert correlation.abs().max() < 5 / math.sqrt(count)


@pytest.mark.parametrize("other", [key(step=2), key(seed=1), key(number=1)])
def test_steps_seeds_and_parameters_have_bits_of_their_own(other: Tensor) -> None:
    count = 1 << 16
    a, b = (random_words(k, count).double() for k in (key(), other))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(count)
    neighbour = torch.corrcoef(torch.stack([a[1:], a[:-1]]))[0, 1]
    assert abs(neighbour) < 5 / math.sqrt(count)


def test_sixteen_bits_are_uniform() -> None:
    """Chi squared over 256 bins of the low and of the high half: 255 degrees of freedom, 5 standard deviations."""
    words = random_words(key(3, 4, 5), 1 << 20)
    for half in (words & 0xFFFF, words >> 16):
        counts = torch.bincount(half >> 8, minlength=256).double()
        expected = (1 << 20) / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * math.sqrt(2 * 255)


def test_the_hash_is_one_to_one_on_words_and_known_at_one() -> None:
    """A mixing of 32 bits loses none: no two of a million neighbouring words collide. 1 by hand from its definition."""
    assert len(mix(torch.arange(1 << 20)).unique()) == 1 << 20
    x = 1 * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    assert mix(torch.tensor([1])).item() == x ^ x >> 16
