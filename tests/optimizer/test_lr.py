"""Learning-rate curves at the points where they are known, and the rates they set."""

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_xl.optimizer.lr import LearningRate, constant, cosine, linear

CURVES = [constant, linear, cosine]


def test_constant_stays_at_one() -> None:
    assert [constant(step, 100) for step in (0, 50, 99)] == [1, 1, 1]


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_decaying_curves_begin_at_one_pass_the_middle_and_end_at_final(final: float) -> None:
    for curve in (linear, cosine):
        values = [curve(step, 1000, final=final) for step in (0, 500, 1000, 2000)]
        assert values == pytest.approx([1, (1 + final) / 2, final, final])


def test_cosine_is_half_a_cosine_and_linear_is_a_line() -> None:
    thirds = [cosine(step, 300) for step in (100, 200)]
    assert thirds == pytest.approx([0.75, 0.25])  # cos 60 and 120 degrees
    assert [linear(step, 300) for step in (100, 200)] == pytest.approx([2 / 3, 1 / 3])
    assert cosine(50, 200) == pytest.approx((1 + math.sqrt(0.5)) / 2)


@settings(deadline=None)
@given(curve=st.sampled_from(CURVES), warmup=st.integers(0, 50), total=st.integers(60, 500))
def test_warm_up_rises_in_equal_parts_from_above_zero_and_then_leaves_the_curve_alone(
    curve: Callable[..., float], warmup: int, total: int
) -> None:
    share = [curve(step, total, warmup=warmup) / curve(step, total) for step in range(60)]
    assert share[0] > 0
    assert share[: warmup + 1] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup + 1)])
    assert share[warmup:] == pytest.approx([1] * (60 - warmup))


@settings(deadline=None)
@given(curve=st.sampled_from([linear, cosine]), final=st.floats(0, 1), total=st.integers(1, 300))
def test_decaying_curves_never_rise_nor_leave_their_bounds(
    curve: Callable[..., float], final: float, total: int
) -> None:
    values = [curve(step, total, final=final) for step in range(total + 5)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))
    assert all(final - 1e-12 <= value <= 1 + 1e-12 for value in values)


def test_every_group_gets_its_own_rate_times_the_factor_however_often_it_is_set() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.4}])
    rate = LearningRate(optimizer, functools.partial(linear, final=0.0), total=10)
    for step in (0, 5, 5, 2, 9, 5):
        told = rate.set(step)
    assert told == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.2])


def test_rate_does_not_compound_over_a_resumed_optimizer_state() -> None:
    """An optimizer's state holds the rate of its last step; only the configured rate may count."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    rate = LearningRate(optimizer, functools.partial(linear, final=0.0), total=10)
    rate.set(8)
    state = optimizer.state_dict()
    fresh = torch.optim.AdamW([weight], lr=0.1)
    resumed = LearningRate(fresh, functools.partial(linear, final=0.0), total=10)
    fresh.load_state_dict(state)
    assert resumed.set(5) == pytest.approx(0.05)
    assert fresh.param_groups[0]["lr"] == pytest.approx(0.05)
