"""Statistics of paired arms: how certain a difference is between arms that share seeds and evaluation items.

Pure functions over tables [S seeds, I items] of float64; a metric without items has I = 1. Sources:
[Clark] The language-as-fixed-effect fallacy, J. Verbal Learning and Verbal Behavior 12 (1973) 335, quasi-F;
[Hillis] A comparison of denominator degrees of freedom methods, Statistics in Medicine 26 (2007) 596: readers x cases;
[Owen] The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007) 386;
[Satterthwaite] An approximate distribution of estimates of variance components, Biometrics Bulletin 2 (1946) 110;
[Welch] The generalization of Student's problem, Biometrika 34 (1947) 28;
[Holm] A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6 (1979) 65.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]

LEVEL = 0.05  # intervals hold 95 %; a verdict asks for an adjusted p below it
RESAMPLES = 2000


def two_sided_p(t: float, df: float) -> float:
    """P(|T| >= |t|) of Student's t with `df` > 0 degrees of freedom, which need not be an integer.

    The incomplete beta function in both of its forms: special.stdtr uses the second alone, and is wrong from the ninth
    digit where df / (df + t t) is close to 1.
    """
    if abs(t) < 1:
        return float(special.betaincc(0.5, df / 2, t * t / (df + t * t)))
    return float(special.betainc(df / 2, 0.5, df / (df + t * t)))


def critical_t(df: float, level: float = LEVEL) -> float:
    """The t whose two_sided_p is `level`."""
    return float(special.stdtrit(df, 1 - level / 2))


# --- one difference ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A share of the variance of a mean, with the degrees of freedom that it was estimated with."""

    variance: float
    df: int


@dataclass(frozen=True)
class Spread:
    """The variance of a mean as the sum of independently estimated parts."""

    parts: tuple[Part, ...]

    @property
    def variance(self) -> float:
        return sum(part.variance for part in self.parts)

    @property
    def df(self) -> float:
        """[Satterthwaite]'s, computed from the parts' shares because the square of a variance can underflow. If all
        parts are 0, those of the first.
        """
        whole = self.variance
        if not whole:
            return self.parts[0].df
        return 1 / sum((part.variance / whole) ** 2 / part.df for part in self.parts)

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % interval."""
        return critical_t(self.df) * math.sqrt(self.variance) if self.variance else 0.0


def spread(table: Array) -> Spread:
    """How far the mean of `table` [S, I] would move with other seeds and other items. Needs S >= 2 or I >= 2.

    Seeds and items are crossed: every seed meets every item, so values that share a seed or an item are not
    independent. By the expected mean squares of the two-way layout, var(mean) = (MS_S + MS_I - MS_SI) / SI ([Clark];
    [Hillis], where every reader reads every case). It has two parts: the seeds' MS_S / SI, with S - 1 degrees of
    freedom, and what the items add, (MS_I - MS_SI) / SI but at least 0, with I - 1. The sum is never less than the
    variance of the mean over S seeds; where the items add nothing, it is the plain t-interval over seeds. [Hillis]
    leaves out the items' degrees of freedom, which matter if there are few items. With S = 1 only the items vary, with
    I = 1 only the seeds.
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
    """A paired difference, arm minus baseline. A single run on each side has no interval: its fields are None."""

    difference: float
    low: float | None  # 95 % interval
    high: float | None
    p: float | None  # two-sided, of this comparison alone
    df: float | None
    bootstrap: tuple[float, float] | None  # for comparison only: too narrow with few seeds
    unpaired: float | None  # half the width that the interval would have if each arm had other seeds and other items
    unpaired_seeds: float | None  # the same with other seeds, but the same items; None with a single seed
    seeds: int
    items: int  # 1: the metric has no items

    @property
    def factor(self) -> float | None:
        """How many times wider the interval would be without pairing; None if the paired one has no width."""
        return self._times(self.unpaired)

    @property
    def factor_seeds(self) -> float | None:
        """How many times wider the interval would be with other seeds but the same items."""
        return self._times(self.unpaired_seeds)

    def _times(self, half: float | None) -> float | None:
        if self.low is None or self.high is None or half is None or self.high <= self.low:
            return None
        return 2 * half / (self.high - self.low)


def effect(arm: Array, baseline: Array) -> Effect:
    """The difference of two tables [S, I] whose rows are the same seeds and whose columns are the same items.

    The interval and p are Student's t with the variance and degrees of freedom of `spread`. The percentile bootstrap is
    given for comparison only: with 3 seeds it contains the true difference in about 75 % of cases instead of 95, as
    tests/compare/test_paired.py simulates.
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
    """The spread of the difference if the arms had different seeds but the same items: [Welch]'s parts for the seeds,
    and what the items add to the paired difference.
    """
    seeds = tuple(spread(table).parts[0] for table in (arm, baseline))
    return Spread(seeds + spread(arm - baseline).parts[1:])


def bootstrap(table: Array, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean of `table` [S, I]. Seeds and items are resampled independently, each with
    replacement, so that values of one seed or one item move together ([Owen]). Equal tables give equal intervals.
    """
    random = np.random.default_rng(0)
    rows, columns = (random.multinomial(n, np.full(n, 1 / n), resamples) / n for n in table.shape)
    means = ((rows @ table) * columns).sum(1)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p of several tests, in their order. If every p below 0.05 counts as a finding, the chance of any false
    finding is at most 5 % ([Holm]). The smallest p is multiplied by n, the next by n - 1 and so on; none is less than
    the one before, or more than 1.
    """
    adjusted, least = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = least
    return adjusted


# --- curves -----------------------------------------------------------------------------------------------------------


def first_reached(curve: Mapping[int, float], target: float, good: str = "lower") -> int | None:
    """The first step at which a curve {step: value} is at its target or better; None if it never is."""
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
