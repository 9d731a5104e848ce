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
    "coherence/too_many": "lower",
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
    if abs(t) < 1:  # from the other side: there df / (df + t t) rounds to 1
        return 1 - _incomplete_beta(0.5, df / 2, t * t / (df + t * t))
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
class Part:
    """A share of the variance of a mean, with the degrees of freedom that it was estimated with."""

    variance: float
    df: int


@dataclass(frozen=True)
class Spread:
    """The variance of a mean as the sum of independently estimated parts; `df` are [Satterthwaite]'s for the sum."""

    parts: tuple[Part, ...]

    @property
    def variance(self) -> float:
        return sum(part.variance for part in self.parts)

    @property
    def df(self) -> float:
        """By shares: the square of a variance can be too small for a float. Those of the first part if all are 0."""
        whole = self.variance
        if not whole:
            return self.parts[0].df
        return 1 / sum((part.variance / whole) ** 2 / part.df for part in self.parts)

    @property
    def half_width(self) -> float:
        """Of the 95 % interval."""
        return critical_t(self.df) * math.sqrt(self.variance) if self.variance else 0.0


def spread(table: Array) -> Spread:
    """How far the mean of `table` [S, I] would move with other seeds and other items. Needs S >= 2 or I >= 2.

    Seeds and items are crossed, so the table has two ways of varying, and values that share a seed or an item are not
    independent: var(mean) = (MS_S + MS_I - MS_SI) / SI with expected mean squares of the two-way layout ([Clark];
    [Hillis]: every item is read by every seed). Its parts are the seeds', MS_S / SI with S - 1 degrees of freedom, and
    what the items add, never less than 0, with I - 1; so the whole is never less than the variance of the S means of
    seeds, and without an items' part it is the plain t-interval over seeds. [Hillis] leaves out the second degrees of
    freedom, which count where items are few. With S = 1 only the items vary, with I = 1 only the seeds.
    """
    seeds, items = table.shape
    if seeds == 1:
        return Spread((Part(float(table.var(ddof=1)) / items, items - 1),))
    of_seeds = Part(float(table.mean(1).var(ddof=1)) / seeds, seeds - 1)
    return Spread((of_seeds,)) if items == 1 else Spread((of_seeds, _of_items(table)))


def _of_items(table: Array) -> Part:
    """(MS_I - MS_SI) / SI, not below 0."""
    seeds, items = table.shape
    by_item = float(table.mean(0).var(ddof=1)) / items  # MS_I / SI
    rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    both = float((rest**2).sum()) / ((seeds - 1) * (items - 1)) / (seeds * items)  # MS_SI / SI
    return Part(max(by_item - both, 0.0), items - 1)


@dataclass(frozen=True)
class Effect:
    """A paired difference, arm minus baseline. None: a single run on each side has no interval."""

    difference: float
    low: float | None  # 95 % interval
    high: float | None
    p: float | None  # two-sided, of this comparison alone
    df: float | None
    bootstrap: tuple[float, float] | None  # beside it, for who asks; too narrow with few seeds
    unpaired: float | None  # half the width that the interval would have if each arm had other seeds and other items
    unpaired_seeds: float | None  # the same with other seeds, but the same items; None with a single seed
    seeds: int
    items: int  # 1: the metric has no items

    @property
    def factor(self) -> float | None:
        """How many times wider the interval would be without pairing; None where the paired one has no width."""
        return self._times(self.unpaired)

    @property
    def factor_seeds(self) -> float | None:
        """The share of the pairing of seeds in `factor`: how many times wider with other seeds but the same items."""
        return self._times(self.unpaired_seeds)

    def _times(self, half: float | None) -> float | None:
        if self.low is None or self.high is None or half is None or self.high <= self.low:
            return None
        return 2 * half / (self.high - self.low)


def effect(arm: Array, baseline: Array) -> Effect:
    """The difference of two tables [S, I] whose rows are the same seeds and whose columns are the same items.

    The interval and p are Student's t with the variance and degrees of freedom of `spread`. The percentile bootstrap
    stands beside them only: over 3 seeds it holds the truth in about 75 % of cases, not 95, which
    tests/report/test_paired.py simulates.
    """
    table = arm - baseline
    mean = float(table.mean())
    shape = seeds, _ = table.shape
    if table.size == 1:
        return Effect(mean, None, None, None, None, None, None, None, *shape)
    found, apart = spread(table), Spread(spread(arm).parts + spread(baseline).parts)
    unpaired = apart.half_width or None
    unpaired_seeds = _other_seeds(arm, baseline).half_width or None if seeds > 1 else None
    if not table.any():  # the same numbers in both arms: nothing to be uncertain of
        return Effect(0.0, 0.0, 0.0, 1.0, found.df, (0.0, 0.0), unpaired, unpaired_seeds, *shape)
    half, error = found.half_width, math.sqrt(found.variance)
    # without any spread the difference is the same everywhere, and certain
    p = two_sided_p(mean / error, found.df) if error else float(mean == 0)
    return Effect(mean, mean - half, mean + half, p, found.df, bootstrap(table), unpaired, unpaired_seeds, *shape)


def _other_seeds(arm: Array, baseline: Array) -> Spread:
    """Of the difference of means had the arms other seeds: [Welch]'s parts, and what the items add to the difference,
    which they still share.
    """
    seeds = tuple(spread(table).parts[0] for table in (arm, baseline))
    return Spread(seeds + spread(arm - baseline).parts[1:])


def bootstrap(table: Array, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean of `table` [S, I]: seeds and items are drawn anew independently, each with
    replacement, so that what shares a seed or an item moves together ([Owen]). The same table gives the same interval.
    """
    random = np.random.default_rng(0)
    rows, columns = (random.multinomial(n, np.full(n, 1 / n), resamples) / n for n in table.shape)
    means = ((rows @ table) * columns).sum(1)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


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
