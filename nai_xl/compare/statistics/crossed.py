"""How certain the mean of a table of seeds x items is: one p-value for two sources of chance.

Seeds and items are crossed: every seed meets every item, so values that share a seed or an item are not independent. By
the expected mean squares of the two-way layout, var(mean) = (MS_S + MS_I - MS_SI) / SI ([Clark]; [Hillis], where every
reader reads every case). No exact test of this sum is known (it is the Behrens-Fisher problem), and Student's t with
approximate degrees of freedom fails where they jump: with few seeds whose mean square is small by luck. The generalised
p-value ([Weerahandi]) takes the expectation over everything that the variances may be, given the mean squares seen:

    p = E[2 Phi(-|d| / sqrt V)],  V = MS_S / u1 + max(MS_I / u2 - MS_SI / u3, 0), each MS over S I,

where u1, u2 and u3 are independent chi-squares over their degrees of freedom, S - 1, I - 1 and (S - 1)(I - 1). Without
items it is Student's t-test over seeds, exactly. benchmarks/verdicts.py simulates its level and power.

[Clark] The language-as-fixed-effect fallacy, J. Verbal Learning and Verbal Behavior 12 (1973) 335;
[Hillis] A comparison of denominator degrees of freedom methods, Statistics in Medicine 26 (2007) 596;
[Weerahandi] Generalized confidence intervals, J. American Statistical Association 88 (1993) 899.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Array = NDArray[np.float64]

LEVEL = 0.05  # intervals hold 95 %; a verdict asks for an adjusted p below it
POWER = 0.8  # with which a planned number of seeds finds the difference it is planned for
MOST_SEEDS = 1000
SAME, COARSE, FAR = 1e-9, 1e-5, 1e6  # of the largest value: equal but for rounding; a step that can matter; a run gone
# nodes in the probability's logit, over +-SPAN: the tails of u1 decide a small p, those of the others hardly
SEED_NODES, SEED_SPAN = 48, 36.0
ITEM_NODES, ITEM_SPAN = 24, 14.0


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


@functools.cache
def chi_square_over_df(df: int, nodes: int, span: float) -> tuple[Array, Array]:
    """[nodes] values of chi-square / df and their weights: the trapezoidal rule in the logit of the probability."""
    logit = np.linspace(-span, span, nodes)
    below, above = special.expit(logit), special.expit(-logit)
    values = np.where(logit < 0, stats.chi2.ppf(below, df), stats.chi2.isf(above, df)) / df
    weights = below * above
    return values, weights / weights.sum()


@dataclass(frozen=True)
class Crossed:
    """The mean squares of a table [seeds, items], each over seeds x items. With one item, only `of_seeds` counts; with
    one seed, only `of_items`.
    """

    seeds: int
    items: int
    of_seeds: float
    of_items: float = 0.0
    of_both: float = 0.0

    @property
    def variance(self) -> float:
        """The estimate of the variance of the mean; never less than that over these seeds alone."""
        return self.of_seeds + max(self.of_items - self.of_both, 0.0)

    def p(self, difference: float) -> float:
        """The two-sided generalised p of this mean against 0. 1 for a difference of 0."""
        if difference == 0:
            return 1.0
        if self.seeds == 1 or self.items == 1:
            variance, df = (self.of_seeds, self.seeds - 1) if self.items == 1 else (self.of_items, self.items - 1)
            return two_sided_p(abs(difference) / math.sqrt(variance), df) if variance else 0.0
        deviation, weights = self._deviations
        return float(2 * special.ndtr(-abs(difference) / deviation) @ weights)

    def half_width(self, level: float = LEVEL) -> float:
        """Half the width of the interval that holds the true mean with probability 1 - `level`: where p is `level`."""
        scale = math.sqrt(self.of_seeds + self.of_items)
        if scale == 0:
            return 0.0
        found = optimize.brentq(lambda x: self.p(scale * math.exp(x)) - level, -20, 20, xtol=1e-9)
        return scale * math.exp(float(found))

    @functools.cached_property
    def _deviations(self) -> tuple[Array, Array]:
        """Standard deviations that the mean may have, and their probabilities."""
        u1, w1 = chi_square_over_df(self.seeds - 1, SEED_NODES, SEED_SPAN)
        u2, w2 = chi_square_over_df(self.items - 1, ITEM_NODES, ITEM_SPAN)
        u3, w3 = chi_square_over_df((self.seeds - 1) * (self.items - 1), ITEM_NODES, ITEM_SPAN)
        of_items = np.maximum(self.of_items / u2[:, None] - self.of_both / u3, 0.0)
        with np.errstate(over="ignore"):
            variance = self.of_seeds / u1[:, None, None] + of_items
        weights = w1[:, None, None] * w2[:, None] * w3
        return np.sqrt(np.maximum(variance, np.finfo(float).tiny)).ravel(), weights.ravel()

    def with_seeds(self, seeds: int) -> Crossed:
        """What the mean squares are expected to be with another number of seeds and the same items."""
        fewer = self.seeds / seeds
        of_item_means = max(self.of_items - self.of_both, 0.0)  # more seeds do not make it smaller
        of_both = self.of_both * fewer
        return replace(
            self, seeds=seeds, of_seeds=self.of_seeds * fewer, of_both=of_both, of_items=of_item_means + of_both
        )

    def detectable(self, seeds: int, level: float = LEVEL) -> float:
        """The true difference that so many seeds, at least 2, show at this level with a probability of about POWER."""
        return self.with_seeds(seeds).half_width(level) * (1 + special.ndtri(POWER) / special.ndtri(1 - level / 2))

    def seeds_for(self, difference: float, level: float = LEVEL) -> int | None:
        """The least number of seeds that show this true difference at this level with a probability of about POWER;
        None if MOST_SEEDS do not, because the items vary too much.
        """
        few, many = 2, MOST_SEEDS
        if difference <= 0 or self.detectable(many, level) > difference:
            return None
        while few < many:
            middle = (few + many) // 2
            few, many = (few, middle) if self.detectable(middle, level) <= difference else (middle + 1, many)
        return many


def crossed(table: Array, resolution: float = 0.0) -> Crossed:
    """The mean squares of `table` [S, I]. Needs S >= 2 or I >= 2.

    `resolution`: the step of the values, of which each table entry is the difference of two. Equal entries then tell
    only that the true ones are within a step of each other, so that no mean square is less than rounding makes it: the
    step's square over 12 for each of the two values, which is Sheppard's correction.
    """
    seeds, items = table.shape
    rounding = resolution**2 / 6 / (seeds * items)
    by_item = float(table.mean(0).var(ddof=1)) / items if items > 1 else 0.0
    if seeds == 1:
        return Crossed(1, items, 0.0, max(by_item, rounding))
    by_seed = max(float(table.mean(1).var(ddof=1)) / seeds, rounding)
    if items == 1:
        return Crossed(seeds, 1, by_seed)
    rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    both = float((rest**2).sum()) / ((seeds - 1) * (items - 1)) / (seeds * items)
    return Crossed(seeds, items, by_seed, by_item, both)


def resolution(*tables: Array) -> float:
    """The step of values that are counts or shares of a count: the largest number of which all their differences are
    multiples. 0 for values without such a step, where all are equal, and where one is far from all others.
    """
    values = np.concatenate([table.ravel() for table in tables])
    largest = float(np.abs(values).max(initial=0.0))
    if not 0 < largest < math.inf or largest > FAR * float(np.median(np.abs(values))) > 0:
        return 0.0
    steps = np.diff(np.unique(values / largest))
    common = functools.reduce(_common_divisor, steps.tolist(), 0.0)
    return common * largest if common > COARSE else 0.0


def _common_divisor(a: float, b: float) -> float:
    """Euclid's, of numbers that are known to SAME."""
    while b > SAME:
        rest = math.fmod(a, b)
        a, b = b, 0.0 if b - rest <= SAME else rest
    return a
