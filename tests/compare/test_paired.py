"""Statistics of paired arms against closed forms, mpmath, scipy's tests, enumeration, and simulated truths."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nai_xl.compare import paired
from nai_xl.compare.paired import Array, Effect, effect, holm, spread
from nai_xl.compare.verdicts import verdict

# --- Student's t ------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1e4))
@example(1e-8)
def test_p_of_one_and_two_degrees_of_freedom_has_a_closed_form(t: float) -> None:
    assert paired.two_sided_p(t, 1) == pytest.approx(2 / math.pi * math.atan2(1, t), rel=1e-9)
    assert paired.two_sided_p(t, 2) == pytest.approx(2 / (2 + t * t + t * math.sqrt(2 + t * t)), rel=1e-9)


def exact_p(t: float, df: float) -> float:
    """I_x(df/2, 1/2) at x = df / (df + t^2), to 30 digits: Digital Library of Mathematical Functions, 8.17."""
    with mpmath.workdps(30):
        x = mpmath.mpf(df) / (mpmath.mpf(df) + mpmath.mpf(t) ** 2)
        return float(mpmath.betainc(mpmath.mpf(df) / 2, 0.5, 0, x, regularized=True))


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 40), st.floats(0.3, 1e4))
@example(1e-9, 7.3)
@example(1e-9, 0.3)
def test_p_is_the_incomplete_beta_function(t: float, df: float) -> None:
    assert paired.two_sided_p(t, df) == pytest.approx(exact_p(t, df), rel=1e-9, abs=1e-300)
    assert paired.two_sided_p(-t, df) == paired.two_sided_p(t, df) and paired.two_sided_p(math.inf, df) == 0


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062047), (2, 4.30265273), (3, 3.18244631), (9, 2.26215716), (1e6, 1.959967)]
)
def test_critical_values_are_the_printed_ones(df: float, t: float) -> None:
    assert paired.critical_t(df) == pytest.approx(t, rel=1e-6)


@given(st.floats(0.3, 1e5), st.floats(1e-6, 0.5))
def test_a_critical_value_has_its_level(df: float, level: float) -> None:
    assert paired.two_sided_p(paired.critical_t(df, level), df) == pytest.approx(level, rel=1e-8)


# --- intervals --------------------------------------------------------------------------------------------------------


def random_table(seed: int, seeds: int, items: int, of_seeds: float, of_items: float, of_both: float) -> Array:
    random = np.random.default_rng(seed)
    return (
        of_seeds * random.standard_normal((seeds, 1))
        + of_items * random.standard_normal((1, items))
        + of_both * random.standard_normal((seeds, items))
    )


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_without_items_it_is_the_paired_t_test_and_beside_it_welchs(seeds: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(seeds)
    first, second = random.normal(size=seeds) + 5, 2 * random.normal(size=seeds) + 5
    found = effect(first[:, None], second[:, None])
    told = stats.ttest_rel(first, second)
    assert found.p == pytest.approx(told.pvalue, rel=1e-8) and found.df == seeds - 1
    assert (found.low, found.high) == pytest.approx(tuple(told.confidence_interval(0.95)))
    apart = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert found.unpaired == found.unpaired_seeds == pytest.approx((apart.high - apart.low) / 2)
    assert found.factor == pytest.approx((apart.high - apart.low) / (found.high - found.low))  # type: ignore[operator]


def test_the_parts_of_the_variance_are_those_of_the_two_way_table() -> None:
    table = random_table(0, 4, 6, 0.5, 1.0, 0.7)
    seeds, items = table.shape
    grand = sum(table[s, i] for s in range(seeds) for i in range(items)) / 24
    row = [sum(table[s, i] for i in range(items)) / items for s in range(seeds)]
    column = [sum(table[s, i] for s in range(seeds)) / seeds for i in range(items)]
    ms_s = items * sum((r - grand) ** 2 for r in row) / (seeds - 1)
    ms_i = seeds * sum((c - grand) ** 2 for c in column) / (items - 1)
    ms_si = sum((table[s, i] - row[s] - column[i] + grand) ** 2 for s in range(seeds) for i in range(items)) / 15
    assert ms_i > ms_si
    found = spread(table)
    assert [part.variance for part in found.parts] == pytest.approx([ms_s / 24, (ms_i - ms_si) / 24])
    assert found.df == pytest.approx((ms_s + ms_i - ms_si) ** 2 / (ms_s**2 / 3 + (ms_i - ms_si) ** 2 / 5))


def coverage(trials: int, *layout: float) -> tuple[float, float]:
    """How often the interval, and the percentile bootstrap beside it, hold the true difference 0."""
    held = booted = 0
    for trial in range(trials):
        table = random_table(trial, *layout)  # type: ignore[arg-type]
        found = spread(table)
        held += paired.two_sided_p(float(table.mean()) / math.sqrt(found.variance), found.df) >= 0.05
        if trial < 300:
            low, high = paired.bootstrap(table, 400)
            booted += low <= 0 <= high
    return held / trials, booted / min(trials, 300)


@pytest.mark.parametrize(
    "layout",
    [
        (2, 1, 1, 0, 0), (3, 1, 1, 0, 0), (5, 1, 1, 0, 0),  # no items
        (3, 40, 1, 0, 1), (3, 40, 0, 1, 1), (3, 40, 0.1, 1, 1), (3, 40, 0.2, 1, 0.3), (2, 64, 0.1, 1, 1),
        (5, 40, 0.2, 1, 1), (10, 40, 0.1, 1, 1), (3, 40, 0, 0, 1),
    ],
)  # fmt: skip
def test_the_interval_holds_the_truth_in_95_of_100_sweeps(layout: tuple[float, ...]) -> None:
    held, _ = coverage(1200, *layout)
    assert 0.915 <= held <= 0.975  # standard error 0.006; least, 0.93, with two seeds that hardly differ


def test_the_percentile_bootstrap_does_not_with_three_seeds() -> None:
    assert coverage(300, 3, 1, 1, 0, 0)[1] < 0.85 and coverage(300, 3, 40, 1, 0, 1)[1] < 0.85
    assert coverage(300, 30, 30, 0.2, 0.2, 1)[1] > 0.9


def test_leaving_out_the_spread_of_items_would_be_too_narrow() -> None:
    held = 0
    for trial in range(1000):
        table = random_table(trial, 5, 40, 0.1, 1.0, 0.3)
        by_seed = table.mean(1)
        held += abs(by_seed.mean()) <= paired.critical_t(4) * by_seed.std(ddof=1) / math.sqrt(5)
    assert held / 1000 < 0.9 < coverage(1000, 5, 40, 0.1, 1.0, 0.3)[0]


def test_the_bootstrap_draws_seeds_and_items_independently() -> None:
    table = random_table(3, 4, 3, 1.0, 0.5, 0.5)
    means = [
        table[np.ix_(seeds, items)].mean()
        for seeds in itertools.product(range(4), repeat=4)
        for items in itertools.product(range(3), repeat=3)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    assert paired.bootstrap(table, 20_000) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_pairing_narrows_by_what_seeds_share() -> None:
    random = np.random.default_rng(0)
    shared = 10 * random.standard_normal((8, 1))
    arm, baseline = (shared + random.standard_normal((8, 20)) for _ in range(2))
    assert (factor := effect(arm, baseline).factor) is not None and 10 < factor < 100
    apart = 10 * random.standard_normal((8, 1)) + random.standard_normal((8, 20))
    assert (factor := effect(arm, apart).factor) is not None and 0.5 < factor < 2


def test_pairing_narrows_by_what_items_share() -> None:
    random = np.random.default_rng(0)
    shared = 10 * random.standard_normal((1, 20))
    arm, baseline = (shared + random.standard_normal((8, 20)) for _ in range(2))
    found = effect(arm, baseline)
    assert found.factor is not None and 10 < found.factor < 100
    assert found.factor_seeds is not None and 0.5 < found.factor_seeds < 2


@pytest.mark.parametrize("same_items", [False, True])
@pytest.mark.parametrize("layout", [(3, 1, 1, 0, 0), (5, 10, 0.5, 1, 1), (3, 40, 0.2, 1, 1), (5, 40, 1, 0.2, 1)])
def test_the_width_without_pairing_is_that_of_runs_that_share_nothing(
    layout: tuple[float, ...], same_items: bool
) -> None:
    """Two arms without a difference, of other seeds: the interval holds 0 in 95 of 100 trials."""
    held, trials = 0, 1000
    for trial in range(trials):
        arm, baseline = (random_table(2 * trial + i, *layout) for i in range(2))  # type: ignore[arg-type]
        if same_items:  # what of their effect is common falls out of the difference
            seeds, items, of_seeds, _, of_both = layout
            arm, baseline = (
                random_table(2 * trial + i, int(seeds), int(items), of_seeds, 0, of_both) for i in range(2)
            )
            common, own = np.random.default_rng(trial).standard_normal((2, 1, int(items)))
            arm, baseline = arm + 3 * common, baseline + 3 * common + own * (items > 1)
        found = effect(arm, baseline)
        half = found.unpaired_seeds if same_items else found.unpaired
        assert half is not None
        held += abs(found.difference) <= half
    assert 0.92 <= held / trials <= 0.985  # Welch's is a little wide with three seeds


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1), (3, 8), (1, 8), (2, 2)])
def test_equal_arms_differ_by_exactly_nothing(shape: tuple[int, int]) -> None:
    table = np.random.default_rng(0).normal(size=shape)
    found = effect(table, table.copy())
    assert (found.difference, found.low, found.high, found.p, found.bootstrap) == (0, 0, 0, 1, (0, 0))
    assert found.factor is None and verdict("val/loss", found.difference, found.p) == "no difference shown"
    assert all(value is None or math.isfinite(value) for value in (found.df, found.unpaired))


@pytest.mark.parametrize("shape", [(3, 1), (3, 4), (2, 1), (1, 4)])
@pytest.mark.parametrize("shift", [0.5, 1e-300, 1e150])
def test_a_difference_without_any_spread_is_certain(shape: tuple[int, int], shift: float) -> None:
    found = effect(np.full(shape, shift), np.zeros(shape))
    assert found.difference == found.low == found.high == shift and found.p == 0


def test_a_single_run_on_each_side_has_no_interval() -> None:
    found = effect(np.array([[1.0]]), np.array([[3.0]]))
    assert found == Effect(-2.0, *6 * [None], None, 1, 1) and found.factor is None
    assert verdict("val/loss", found.difference, found.p) == "one seed only"


TABLE = st.tuples(st.integers(2, 5), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(*2 * [arrays(float, shape, elements=st.integers(-1000, 1000).map(float))])
)


@settings(max_examples=60, deadline=None)
@given(TABLE, st.integers(-10_000, 10_000), st.sampled_from([0.25, 2.0, 1024.0]))
def test_order_shift_and_unit_do_not_matter(pair: tuple[Array, Array], shift: int, scale: float) -> None:
    arm, baseline = pair
    plain = effect(arm, baseline)
    seeds, items = (
        np.random.default_rng(0).permutation(arm.shape[0]),
        np.random.default_rng(1).permutation(arm.shape[1]),
    )
    mixed = effect(arm[np.ix_(seeds, items)], baseline[np.ix_(seeds, items)])
    shifted = effect(arm + shift, baseline + shift)
    scaled = effect(scale * arm, scale * baseline)
    turned = effect(baseline, arm)
    for other, unit in ((mixed, 1.0), (shifted, 1.0), (scaled, scale)):
        got = [other.difference, other.low, other.high]
        assert got == pytest.approx([unit * v for v in (plain.difference, plain.low, plain.high)], rel=1e-6, abs=1e-6)
        assert other.p == pytest.approx(plain.p, rel=1e-5, abs=1e-12)
    assert turned.difference == -plain.difference and turned.p == plain.p and turned.low == pytest.approx(-plain.high)


# --- several tests ----------------------------------------------------------------------------------------------------


def test_holms_example_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(p: list[float]) -> None:
    """A hypothesis falls only when every intersection that it is part of falls (Marcus, Peritz, Gabriel 1976)."""
    for i, adjusted in enumerate(holm(p)):
        parts = [c for n in range(1, len(p) + 1) for c in itertools.combinations(range(len(p)), n) if i in c]
        assert adjusted == pytest.approx(max(min(1.0, len(c) * min(p[k] for k in c)) for c in parts))


# --- targets ------------------------------------------------------------------------------------------------------


def test_the_first_step_at_the_target() -> None:
    curve = {300: 0.1, 100: 0.5, 200: 0.3, 400: 0.2}
    assert [paired.first_reached(curve, target) for target in (0.6, 0.3, 0.29, 0.01)] == [100, 200, 300, None]
    assert paired.first_reached(curve, 0.4, "higher") == 100


def test_ratios_are_paired_over_seeds() -> None:
    assert paired.ratio([500, 1000], [1000, 2000]) == pytest.approx((0.5, 0.5, 0.5))
    middle, low, high = paired.ratio([400, 900, 1500], [1000, 2000, 2900])
    logs = np.log([0.4, 0.45, 1500 / 2900])
    half = 4.30265273 * logs.std(ddof=1) / math.sqrt(3)
    assert (middle, low, high) == pytest.approx(tuple(np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])))
    assert paired.ratio([1], [2]) == (0.5, None, None)
