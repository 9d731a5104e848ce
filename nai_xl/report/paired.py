"""Statistics of paired arms: what a difference is worth when arms share seeds and evaluation items.

Pure functions over tables [S seeds, I items] of float64; a metric without items has I = 1. Sources:
[Clark] The language-as-fixed-effect fallacy, J. Verbal Learning and Verbal Behavior 12 (1973) 335, quasi-F;
[Hillis] A comparison of denominator degrees of freedom methods, Statistics in Medicine 26 (2007) 596: readers x cases;
[Owen] The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007) 386;
[Satterthwaite] An approximate distribution of estimates of variance components, Biometrics Bulletin 2 (1946) 110;
[Welch] The generalization of Student's problem, Biometrika 34 (1947) 28;
[Holm] A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6 (1979) 65;
[DLMF] Digital Library of Mathematical Functions, dlmf.nist.gov.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.05  # intervals hold 95 %; a verdict asks for an adjusted p below it
RESAMPLES = 2000

# The longest prefix of a metric's name that stands here says which direction is better
DIRECTIONS = {
    "val/": "lower",
    "train/loss": "lower",
    "color/error": "lower",
    "color/luminance_min": "lower",
    "color/luminance_max": "higher",
    "color/luminance_range": "higher",
    "coherence/count_error": "lower",
    "coherence/cut": "lower",
    "coherence/right": "higher",
    "quality/fid": "lower",
    "quality/kid": "lower",
    "quality/clip": "higher",
    "perf/images_per_second": "higher",
    "perf/tflops": "higher",
    "perf/mfu": "higher",
    "perf/data_wait": "lower",
    "perf/peak_memory_gib": "lower",
}

NO_DIFFERENCE, ONE_SEED = "no difference shown", "one seed only"


def better_direction(metric: str) -> str | None:
    """'lower' or 'higher', or None for a metric that is not in DIRECTIONS."""
    known = [prefix for prefix in DIRECTIONS if metric.startswith(prefix)]
    return DIRECTIONS[max(known, key=len)] if known else None


def verdict(metric: str, difference: float, p: float | None) -> str:
    """In a word, from the adjusted p; a metric of unknown direction is 'higher' or 'lower', not better or worse.

    `p` is None where a single seed leaves nothing to judge by.
    """
    if p is None:
        return ONE_SEED
    if p >= LEVEL or difference == 0:
        return NO_DIFFERENCE
    side = "lower" if difference < 0 else "higher"
    good = better_direction(metric)
    return side if good is None else "better" if side == good else "worse"


# --- Student's t ------------------------------------------------------------------------------------------------------


def two_sided_p(t: float, df: float) -> float:
    """P(|T| >= |t|) of Student's t with `df` > 0 degrees of freedom, which need not be whole ([DLMF] 8.17)."""
    if math.isinf(t):
        return 0.0
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t))


def critical_t(df: float, level: float = LEVEL) -> float:
    """The t that two_sided_p takes to `level`, by bisection."""
    low, high = 0.0, 1.0
    while two_sided_p(high, df) > level:
        high *= 2
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > level else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised I_x(a, b): its continued fraction [DLMF] 8.17.22, on the side where that converges fast."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(front) / a / _continued_fraction(a, b, x)


def _continued_fraction(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)) by Lentz's method."""
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for n in range(1, 10_000):
        m = n // 2
        if n % 2:
            step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            step = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + step * d or tiny)
        c = 1 + step / c or tiny
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


# --- one difference ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The variance of a grand mean over seeds and items, by its parts, with degrees of freedom for each."""

    seeds: float  # of the mean, from seed to seed
    items: float  # what the choice of items adds
    df: float

    @property
    def variance(self) -> float:
        return self.seeds + self.items


def spread(table: Array) -> Spread:
    """How far the mean of `table` [S, I] would move with other seeds and other items. Needs S >= 2 or I >= 2.

    Seeds and items are crossed, so the table has two ways of varying, and values that share a seed or an item are not
    independent: var(mean) = (MS_S + MS_I - MS_SI) / SI with expected mean squares of the two-way layout ([Clark];
    [Hillis]: every item is read by every seed). The items' part is never less than 0, so the whole is never less than
    the variance of the S means of seeds. Degrees of freedom are [Satterthwaite]'s for a sum of two parts with S - 1 and
    I - 1, as [Hillis] has them but for the second, which counts where items are few; without an items' part they are
    S - 1: the plain t-interval over seeds. With S = 1 only the items vary.
    """
    seeds, items = table.shape
    if seeds == 1:
        return Spread(0.0, float(table.var(ddof=1)) / items, items - 1)
    by_seed = float(table.mean(1).var(ddof=1)) / seeds
    if items == 1:
        return Spread(by_seed, 0.0, seeds - 1)
    by_item = float(table.mean(0).var(ddof=1)) / items  # MS_I / SI
    rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    both = float((rest**2).sum()) / ((seeds - 1) * (items - 1)) / (seeds * items)  # MS_SI / SI
    added = max(by_item - both, 0.0)
    uncertain = by_seed**2 / (seeds - 1) + added**2 / (items - 1)
    # without any spread, or with one too small for its square to be a float, there is nothing to divide by
    return Spread(by_seed, added, (by_seed + added) ** 2 / uncertain if uncertain else seeds - 1)


@dataclass(frozen=True)
class Effect:
    """A paired difference, arm minus baseline. None: a single run on each side has no interval."""

    difference: float
    low: float | None  # 95 % interval
    high: float | None
    p: float | None  # two-sided, of this comparison alone
    df: float | None
    bootstrap: tuple[float, float] | None  # beside it, for who asks; too narrow with few seeds
    unpaired: float | None  # half the width the interval would have with other seeds in each arm
    seeds: int
    items: int  # 1: the metric has no items

    @property
    def factor(self) -> float | None:
        """How many times wider the interval would be without pairing; None where the paired one has no width."""
        if self.low is None or self.high is None or self.unpaired is None or self.high <= self.low:
            return None
        return 2 * self.unpaired / (self.high - self.low)


def effect(arm: Array, baseline: Array) -> Effect:
    """The difference of two tables [S, I] whose rows are the same seeds and whose columns are the same items.

    The interval and p are Student's t with the variance and degrees of freedom of `spread`. The percentile bootstrap
    stands beside them only: over 3 seeds it holds the truth in about 75 % of cases, not 95, which
    tests/report/test_paired.py simulates.
    """
    table = arm - baseline
    mean = float(table.mean())
    seeds, items = table.shape
    if table.size == 1:
        return Effect(mean, None, None, None, None, None, None, seeds, items)
    if not table.any():  # the same numbers in both arms: nothing to be uncertain of
        return Effect(
            0.0, 0.0, 0.0, 1.0, spread(table).df, (0.0, 0.0), unpaired_half_width(arm, baseline), seeds, items
        )
    found = spread(table)
    half, p = _t_interval(mean, found.variance, found.df)
    return Effect(
        mean, mean - half, mean + half, p, found.df, bootstrap(table), unpaired_half_width(arm, baseline), seeds, items
    )


def _t_interval(mean: float, variance: float, df: float) -> tuple[float, float]:
    """Half the 95 % interval's width, and the two-sided p of the mean being 0."""
    error = math.sqrt(variance)
    if error == 0:
        return 0.0, float(mean == 0)  # the same difference everywhere, such as none at all
    return critical_t(df) * error, two_sided_p(mean / error, df)


def bootstrap(table: Array, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean of `table` [S, I]: seeds and items are drawn anew independently, each with
    replacement, so that what shares a seed or an item moves together ([Owen]). The same table gives the same interval.
    """
    random = np.random.default_rng(0)
    rows, columns = (random.multinomial(n, np.full(n, 1 / n), resamples) / n for n in table.shape)
    means = ((rows @ table) * columns).sum(1)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def unpaired_half_width(arm: Array, baseline: Array) -> float | None:
    """Half the 95 % interval of the difference had the arms' seeds nothing in common: [Welch]'s over seeds. The items
    would still be the same, so their part is that of the paired interval. None with a single seed.
    """
    seeds = arm.shape[0]
    if seeds < 2:
        return None
    first, second = (float(table.mean(1).var(ddof=1)) / seeds for table in (arm, baseline))
    items = spread(arm - baseline).items
    uncertain = (first**2 + second**2) / (seeds - 1)
    if not uncertain:
        return None
    variance = first + second + items
    return critical_t(variance**2 / uncertain) * math.sqrt(variance)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p of several tests, in their order: below 0.05 the chance of a single false alarm is at most 5 %
    ([Holm]): the smallest times n, the next times n - 1, never less than the one before, at most 1.
    """
    adjusted, least = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = least
    return adjusted


# --- curves -----------------------------------------------------------------------------------------------------------


def first_reached(curve: Mapping[int, float], target: float, good: str = "lower") -> int | None:
    """The first step at which a curve {step: value} is at its target or beyond; None where it never is."""
    for step in sorted(curve):
        if curve[step] <= target if good == "lower" else curve[step] >= target:
            return step
    return None


def ratio(arm: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The geometric mean of arm / baseline over paired seeds, all positive, and its 95 % interval: t on the logarithms.
    A single seed has no interval.
    """
    found = effect(np.log(np.array(arm))[:, None], np.log(np.array(baseline))[:, None])
    ends = [None if end is None else math.exp(end) for end in (found.low, found.high)]
    return math.exp(found.difference), ends[0], ends[1]
