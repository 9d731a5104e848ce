"""Draws are named by (seed, position, purpose) and by nothing else."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_xl.rng import Draws, draws, generator, hashed

SEEDS, POSITIONS = st.integers(0, 2**63), st.integers(0, 2**63)
few = settings(deadline=None, max_examples=80)


@few
@given(seed=SEEDS, position=POSITIONS, other=POSITIONS)
def test_what_was_asked_before_changes_nothing(seed: int, position: int, other: int) -> None:
    alone = draws(seed, position).noise((3,)), draws(seed, position).u, draws(seed, position).choice("crop", 7)
    torch.manual_seed(other)
    draws(seed, other).noise((5, 5))
    torch.rand(3)
    draw = draws(seed, position)
    choice, noise, u = draw.choice("crop", 7), draw.noise((3,)), draw.u
    assert torch.equal(noise, alone[0])
    assert (u, choice) == alone[1:]


def test_another_process_draws_the_same_numbers() -> None:
    program = (
        "from nai_xl.rng import draws; d = draws(5, 1234567); "
        "print(repr(d.u), d.choice('x', 9), d.noise((4,)).tolist())"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    d = draws(5, 1234567)
    assert told.strip() == f"{d.u!r} {d.choice('x', 9)} {d.noise((4,)).tolist()}"


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draws(0, 0).noise((100,))
    generator(0, 0, "x")
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_position_and_purpose_each_make_a_difference_and_do_not_run_together() -> None:
    names = [(s, p, purpose) for s in (0, 1, 11) for p in (0, 1, 11) for purpose in ("", "a", "1", "1/a")]
    assert len({hashed(*name) for name in names}) == len(names)
    assert len({draws(s, p).uniform(purpose) for s, p, purpose in names}) == len(names)


@pytest.mark.parametrize("other", [Draws(1, 0), Draws(0, 1)])
def test_noise_of_other_seeds_and_positions_is_unrelated(other: Draws) -> None:
    pair = torch.stack([draws(0, 0).noise((20_000,)), other.noise((20_000,))])
    assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.03


@few
@given(seed=SEEDS, position=POSITIONS, purpose=st.text(max_size=9), count=st.integers(1, 10**6))
def test_uniform_lies_in_0_1_and_choice_in_its_range(seed: int, position: int, purpose: str, count: int) -> None:
    draw = draws(seed, position)
    assert 0 <= draw.uniform(purpose) < 1
    assert 0 <= draw.choice(purpose, count) < count
    assert draw.choice(purpose, 1) == 0


def test_the_largest_hash_is_still_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nai_xl.rng.hashed", lambda *_: 2**64 - 1)
    assert draws(0, 0).uniform("x") == 1 - 2.0**-53
    assert draws(0, 0).choice("x", 10**9) == 10**9 - 1


@pytest.mark.parametrize("purpose", ["timestep", "placement", "caption dropout"])
def test_draws_along_a_run_are_uniform_and_independent(purpose: str) -> None:
    u = np.array([draws(3, position).uniform(purpose) for position in range(10_000)])
    distance = np.abs(np.sort(u) - (np.arange(10_000) + 0.5) / 10_000).max()
    assert distance < 1.95 / 100  # Kolmogorov and Smirnov at 0.1 %
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.04


def test_choices_are_equally_likely() -> None:
    counts = np.bincount([draws(0, position).choice("crop", 5) for position in range(5000)], minlength=5)
    assert ((counts - 1000) ** 2 / 1000).sum() < 18.5  # chi squared with 4 degrees of freedom at 0.1 %


def test_noise_is_standard_normal_within_and_across_positions() -> None:
    inside = draws(0, 7).noise((4, 128, 128))
    across = torch.stack([draws(0, position).noise((4,)) for position in range(5000)]).flatten()
    for noise in (inside.flatten(), across):
        assert noise.dtype == torch.float32
        assert abs(noise.mean().item()) < 4 / len(noise) ** 0.5
        assert noise.var().item() == pytest.approx(1, abs=6 / len(noise) ** 0.5)
        assert noise.pow(4).mean().item() == pytest.approx(3, abs=0.2)


STRATA = st.integers(1, 300)


@few
@given(seed=SEEDS, block=st.integers(0, 2**40), strata=STRATA)
def test_every_block_of_positions_draws_once_from_every_stratum(seed: int, block: int, strata: int) -> None:
    u = [draws(seed, block * strata + place).stratified_u(strata) for place in range(strata)]
    assert all(0 <= number < 1 for number in u)
    assert sorted(int(number * strata) for number in u) == list(range(strata))


@few
@given(seed=SEEDS, position=POSITIONS, other=POSITIONS, strata=STRATA)
def test_stratified_draw_is_a_function_of_seed_and_position(seed: int, position: int, other: int, strata: int) -> None:
    alone = draws(seed, position).stratified_u(strata)
    torch.manual_seed(other)
    draws(seed, other).stratified_u(strata)
    assert draws(seed, position).stratified_u(strata) == alone
    assert draws(seed + 1, position).stratified_u(strata) != alone


def test_blocks_are_ordered_differently() -> None:
    orders = {tuple(int(draws(0, 16 * block + i).stratified_u(16) * 16) for i in range(16)) for block in range(50)}
    assert len(orders) == 50


def test_one_place_of_the_block_still_draws_uniformly() -> None:
    u = np.array([draws(3, 8 * block + 2).stratified_u(8) for block in range(10_000)])
    distance = np.abs(np.sort(u) - (np.arange(10_000) + 0.5) / 10_000).max()
    assert distance < 1.95 / 100  # Kolmogorov and Smirnov at 0.1 %
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.04


def test_a_mean_over_a_block_varies_far_less_than_of_independent_draws() -> None:
    means = [np.mean([draws(1, 64 * block + i).stratified_u(64) for i in range(64)]) for block in range(100)]
    assert np.std(means) < 0.1 * (1 / 12 / 64) ** 0.5


def test_the_largest_stratified_draw_is_still_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draws, "u", 1 - 2.0**-53)
    assert max(draws(0, place).stratified_u(256) for place in range(256)) == 1 - 2.0**-53


@few
@given(seed=SEEDS, position=POSITIONS, shape=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_noise_written_in_place_is_the_same_noise(seed: int, position: int, shape: list[int]) -> None:
    rows = torch.empty(3, *shape)  # rows that are not aligned to a vector register as a tensor of its own would be
    for row in rows:
        assert draws(seed, position).noise(shape, out=row) is row
        assert torch.equal(row, draws(seed, position).noise(shape))
    assert torch.equal(rows[0], torch.randn(shape, generator=generator(seed, position, "noise")))
