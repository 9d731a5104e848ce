"""Statistics of paired arms against closed forms, mpmath, scipy's tests, enumeration, and simulated truths."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special

from nai_xl.compare.statistics import paired
from nai_xl.compare.statistics.crossed import Array, Crossed, critical_t, crossed, resolution, two_sided_p
from nai_xl.compare.statistics.paired import Effect, effect, holm

# --- Student's t ------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1e4))
@example(1e-8)
def test_p_of_one_and_two_degrees_of_freedom_has_a_closed_form(t: float) -> None:
    assert two_sided_p(t, 1) == pytest.approx(2 / math.pi * math.atan2(1, t), rel=1e-9)
    assert two_sided_p(t, 2) == pytest.approx(2 / (2 + t * t + t * math.sqrt(2 + t * t)), rel=1e-9)


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
    assert two_sided_p(t, df) == pytest.approx(exact_p(t, df), rel=1e-9, abs=1e-300)
    assert two_sided_p(-t, df) == two_sided_p(t, df) and two_sided_p(math.inf, df) == 0


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062047), (2, 4.30265273), (3, 3.18244631), (9, 2.26215716), (1e6, 1.959967)]
)
def test_critical_values_are_the_printed_ones(df: float, t: float) -> None:
    assert critical_t(df) == pytest.approx(t, rel=1e-6)


@given(st.floats(0.3, 1e5), st.floats(1e-6, 0.5))
def test_a_critical_value_has_its_level(df: float, level: float) -> None:
    assert two_sided_p(critical_t(df, level), df) == pytest.approx(level, rel=1e-8)


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
    assert found.p == pytest.approx(told.pvalue, rel=1e-8)
    assert (found.low, found.high) == pytest.approx(tuple(told.confidence_interval(0.95)), rel=1e-6)
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
    found = crossed(table)
    assert (found.of_seeds, found.of_items, found.of_both) == pytest.approx((ms_s / 24, ms_i / 24, ms_si / 24))
    assert found.variance == pytest.approx((ms_s + ms_i - ms_si) / 24)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_variance_is_that_of_a_mixed_model(seed: int) -> None:
    """value ~ 1 + (1 | seed) + (1 | item) by REML, which for a whole table agrees with the mean squares."""
    formula = pytest.importorskip("statsmodels.formula.api")
    pandas = pytest.importorskip("pandas")
    table = random_table(seed, 6, 8, 1.0, 1.0, 0.7)
    seeds, items = np.indices(table.shape)
    data = pandas.DataFrame({"y": table.ravel(), "seed": seeds.ravel(), "item": items.ravel(), "all": 1})
    parts = {"seed": "0 + C(seed)", "item": "0 + C(item)"}
    fitted = formula.mixedlm("y ~ 1", data, groups="all", re_formula="0", vc_formula=parts).fit(reml=True)
    assert fitted.bse["Intercept"] ** 2 == pytest.approx(crossed(table).variance, rel=1e-3)


@pytest.mark.parametrize("layout", [(2, 4, 1, 1, 1), (3, 16, 0.1, 1, 1), (5, 40, 0, 0, 1), (12, 64, 1, 0.1, 1)])
def test_p_is_the_mean_over_all_variances_that_the_mean_squares_allow(layout: tuple[float, ...]) -> None:
    """Against the definition, by Monte Carlo."""
    table = random_table(1, *layout)  # type: ignore[arg-type]
    found, random, draws = crossed(table), np.random.default_rng(0), 400_000
    seeds, items = table.shape
    u1, u2, u3 = (random.chisquare(df, draws) / df for df in (seeds - 1, items - 1, (seeds - 1) * (items - 1)))
    variance = found.of_seeds / u1 + np.maximum(found.of_items / u2 - found.of_both / u3, 0)
    for times in (0.5, 2, 4):
        difference = times * math.sqrt(found.variance)
        each = 2 * special.ndtr(-difference / np.sqrt(variance))
        assert found.p(difference) == pytest.approx(each.mean(), abs=5 * each.std() / math.sqrt(draws))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 20), st.floats(0.001, 0.4))
def test_the_interval_ends_where_p_is_its_level(seed: int, seeds: int, items: int, level: float) -> None:
    found = crossed(random_table(seed, seeds, items, 1.0, 1.0, 1.0))
    half = found.half_width(level)
    assert found.p(half) == pytest.approx(level, rel=1e-5) and found.p(1.01 * half) < level < found.p(0.99 * half)


def coverage(trials: int, *layout: float) -> tuple[float, float]:
    """How often the interval, and the percentile bootstrap beside it, hold the true difference 0."""
    held = booted = 0
    for trial in range(trials):
        table = random_table(trial, *layout)  # type: ignore[arg-type]
        held += crossed(table).p(float(table.mean())) >= 0.05
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
    """And in more where the sources are alike: benchmarks/verdicts.py has the table of 20,000 draws a row."""
    held, _ = coverage(1200, *layout)
    assert 0.935 <= held <= 0.995  # standard error 0.006


def test_the_percentile_bootstrap_does_not_with_three_seeds() -> None:
    assert coverage(300, 3, 1, 1, 0, 0)[1] < 0.85 and coverage(300, 3, 40, 1, 0, 1)[1] < 0.85
    assert coverage(300, 30, 30, 0.2, 0.2, 1)[1] > 0.9


def test_leaving_out_the_spread_of_items_would_be_too_narrow() -> None:
    held = 0
    for trial in range(1000):
        table = random_table(trial, 5, 40, 0.1, 1.0, 0.3)
        by_seed = table.mean(1)
        held += abs(by_seed.mean()) <= critical_t(4) * by_seed.std(ddof=1) / math.sqrt(5)
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
        half = paired.unpaired_half_widths(arm, baseline)[same_items]
        assert half is not None
        held += abs((arm - baseline).mean()) <= half
    assert 0.92 <= held / trials <= 0.985  # Welch's is a little wide with three seeds


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1), (3, 8), (1, 8), (2, 2)])
def test_equal_arms_differ_by_exactly_nothing(shape: tuple[int, int]) -> None:
    table = np.random.default_rng(0).normal(size=shape)
    found = effect(table, table.copy())
    assert (found.difference, found.low, found.high, found.p, found.bootstrap) == (0, 0, 0, 1, (0, 0))
    assert found.factor is None and found.equal_p(0.1) == 0
    assert found.unpaired is None or math.isfinite(found.unpaired)


@pytest.mark.parametrize("shape", [(3, 1), (3, 4), (2, 1), (1, 4)])
@pytest.mark.parametrize("shift", [0.5, 1e-100, 1e150])
def test_a_difference_without_any_spread_is_known_to_the_step_of_its_values(
    shape: tuple[int, int], shift: float
) -> None:
    """6/8, 6/8 and 6/8 against 5/8, 5/8 and 5/8: a step of 1/8 is all that is known of the spread."""
    found = effect(np.full(shape, shift), np.zeros(shape))
    assert found.difference == shift and found.p is not None and found.low is not None
    assert 0 < found.p < 1 and found.low < shift
    if shape == (3, 1):  # sqrt(6 S) steps of standard error away, with two degrees of freedom
        assert found.p == pytest.approx(two_sided_p(math.sqrt(18), 2))


def test_the_step_of_values_is_their_common_divisor() -> None:
    assert resolution(np.array([[1 / 8, 6 / 8]]), np.array([[2 / 8, 6 / 8 + 1e-12]])) == pytest.approx(1 / 8)
    random = np.random.default_rng(0)
    assert resolution(random.normal(size=(3, 1)), random.normal(size=(3, 1))) == 0
    counts = random.integers(0, 25, (5, 9)) / 24
    assert resolution(counts) == pytest.approx(1 / 24) and resolution(7 + counts) == pytest.approx(1 / 24)
    assert resolution(np.array([[3.0]]), np.array([[3.0]])) == 0 and resolution(np.array([[math.inf]])) == 0


def test_a_single_run_on_each_side_has_no_interval() -> None:
    found = effect(np.array([[1.0]]), np.array([[3.0]]))
    assert found == Effect(-2.0, *6 * [None], 1, 1, -2.0, None) and found.factor is None and found.equal_p(5.0) is None


def test_errors_are_compared_by_their_ratio() -> None:
    random = np.random.default_rng(0)
    baseline = np.exp(random.standard_normal((4, 1)) + random.standard_normal((1, 9)))
    arm = 0.9 * baseline * np.exp(0.01 * random.standard_normal((4, 9)))
    found, logs = effect(arm, baseline, ratio=True), effect(np.log(arm), np.log(baseline))
    assert found.estimate == logs.difference and found.p == logs.p and found.ratio
    assert found.difference == pytest.approx((np.exp(logs.difference) - 1) * baseline.mean())
    assert logs.low is not None and found.low == pytest.approx((np.exp(logs.low) - 1) * baseline.mean())
    plain = effect(arm, baseline)
    assert found.p is not None and plain.p is not None and found.p < plain.p / 10
    scaled = effect(7 * arm, 7 * baseline, ratio=True)
    assert scaled.p == pytest.approx(found.p) and scaled.difference == pytest.approx(7 * found.difference)


# --- equal, and how many seeds ----------------------------------------------------------------------------------------


def test_equality_without_items_is_two_one_sided_t_tests() -> None:
    """[Schuirmann], as statsmodels has it."""
    weight = pytest.importorskip("statsmodels.stats.weightstats")
    first, second = np.random.default_rng(3).normal(size=(2, 6)) / 10
    for margin in (0.05, 0.1, 0.3):
        told, *_ = weight.ttost_paired(first, second, -margin, margin)
        found = effect(first[:, None], second[:, None]).equal_p(margin)
        assert found == pytest.approx(told if abs((first - second).mean()) < margin else 1, rel=1e-6)


def test_arms_at_the_margin_are_called_equal_in_5_of_100_sweeps() -> None:
    margin, called = 0.5, 0
    for trial in range(1500):
        table = random_table(trial, 4, 12, 0.2, 0.3, 0.3) + margin
        called += crossed(table).p(margin - table.mean()) / 2 < 0.05 and abs(table.mean()) < margin
    assert called / 1500 < 0.065  # standard error 0.006


@pytest.mark.parametrize("seeds", [4, 8])
def test_the_detectable_difference_is_detected_in_80_of_100_sweeps(seeds: int) -> None:
    """Of its own expected mean squares; those of a pilot vary in addition."""
    of_seeds, of_items, of_both, items = 1.0, 0.3, 1.0, 10
    expected = Crossed(
        5, items,
        of_seeds=of_seeds**2 / 5 + of_both**2 / (5 * items),
        of_items=of_items**2 / items + of_both**2 / (5 * items), of_both=of_both**2 / (5 * items),
    )  # fmt: skip
    true, shown = expected.detectable(seeds), 0
    for trial in range(600):
        table = random_table(trial, seeds, items, of_seeds, of_items, of_both) + true
        shown += crossed(table).p(float(table.mean())) < 0.05
    assert 0.72 < shown / 600 < 0.9
    assert expected.seeds_for(true) == seeds and expected.seeds_for(0.999 * true) == seeds + 1


def test_no_number_of_seeds_makes_up_for_few_items() -> None:
    items_alone = Crossed(5, 4, of_seeds=0.01, of_items=1.0, of_both=0.01)
    assert items_alone.seeds_for(0.5) is None and items_alone.seeds_for(10.0) == 2
    assert items_alone.with_seeds(500).variance == pytest.approx(0.99 + 0.01 / 100)


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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.data())
def test_claims_of_which_only_some_can_be_false_are_the_closure_over_those(p: list[float], data: st.DataObject) -> None:
    """[Shaffer]: no intersection of more than `possible` hypotheses is possible, so none of those need fall."""
    possible = data.draw(st.integers(1, len(p)))
    for i, adjusted in enumerate(holm(p, possible)):
        parts = [c for n in range(1, possible + 1) for c in itertools.combinations(range(len(p)), n) if i in c]
        assert adjusted >= max(min(1.0, len(c) * min(p[k] for k in c)) for c in parts) * (1 - 1e-12)
        assert adjusted <= holm(p)[i]


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
