"""Paired differences: how certain a difference is between arms that share seeds and evaluation items.

Pure functions over tables [S seeds, I items] of float64; a metric without items has I = 1. Sources:
[Owen] The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007) 386;
[Satterthwaite] An approximate distribution of estimates of variance components, Biometrics Bulletin 2 (1946) 110;
[Schuirmann] A comparison of the two one-sided tests procedure, J. Pharmacokinetics and Biopharmaceutics 15 (1987) 657;
[Shaffer] Modified sequentially rejective multiple test procedures, J. American Statistical Association 81 (1986) 826;
[Welch] The generalization of Student's problem, Biometrika 34 (1947) 28;
[Holm] A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6 (1979) 65.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nai_xl.compare.statistics.crossed import LEVEL, Array, Crossed, critical_t, crossed, resolution

RESAMPLES = 2000

# --- one difference ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """A paired difference, arm minus baseline. A single run on each side has no interval: its fields are None.

    Positive errors are compared by their ratios: `estimate` is then the mean log ratio, and differences are what that
    ratio makes of the baseline's mean. Otherwise `estimate` is the difference itself.
    """

    difference: float  # in the metric's units, as the further fields down to unpaired_seeds
    low: float | None  # 95 % interval
    high: float | None
    p: float | None  # two-sided, of this comparison alone
    bootstrap: tuple[float, float] | None  # for comparison only: too narrow with few seeds
    unpaired: float | None  # half the width that the interval would have if each arm had other seeds and other items
    unpaired_seeds: float | None  # the same with other seeds, but the same items; None with a single seed
    seeds: int
    items: int  # 1: the metric has no items
    estimate: float
    spread: Crossed | None  # of the estimate
    ratio: bool = False

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

    def equal_p(self, margin: float) -> float | None:
        """The p of the claim that the true estimate lies within +-`margin`: the larger of two one-sided tests
        ([Schuirmann]). None without a spread.
        """
        if self.spread is None:
            return None
        inside = margin - abs(self.estimate)
        return self.spread.p(inside) / 2 if inside > 0 else 1.0

    def seeds_to_decide(self, margin: float | None, level: float) -> int | None:
        """About how many seeds would show at this level that this estimate differs from 0 or, if it is smaller than
        `margin`, lies within it, whichever takes fewer; more than there are. None if no number does.
        """
        if self.spread is None or self.spread.seeds < 2:
            return None
        goals = [abs(self.estimate), *([margin - abs(self.estimate)] if margin is not None else [])]
        found = self.spread.seeds_for(max(goals), level)
        return None if found is None else max(found, self.seeds + 1)


def effect(arm: Array, baseline: Array, *, ratio: bool = False) -> Effect:
    """The difference of two tables [S, I] whose rows are the same seeds and whose columns are the same items.

    With `ratio` all values must be positive. The interval and p are those of crossed.Crossed. The percentile bootstrap
    is given for comparison only: with 3 seeds it contains the true difference in about 75 % of cases instead of 95, as
    tests/compare/test_paired.py simulates.
    """
    step, mean = resolution(arm, baseline), float(baseline.mean())
    if ratio:
        return _in_units(_effect(np.log(arm), np.log(baseline), step / mean), mean)
    return _effect(arm, baseline, step)


def _effect(arm: Array, baseline: Array, step: float) -> Effect:
    table = arm - baseline
    seeds, items = table.shape
    mean = float(table.mean())
    plain = Effect(mean, None, None, None, None, None, None, seeds=seeds, items=items, estimate=mean, spread=None)
    if table.size == 1:
        return plain
    unpaired, unpaired_seeds = unpaired_half_widths(arm, baseline)
    plain = replace(plain, unpaired=unpaired, unpaired_seeds=unpaired_seeds)
    if not table.any():  # the same numbers in both arms: nothing to be uncertain of
        return replace(plain, low=0.0, high=0.0, p=1.0, bootstrap=(0.0, 0.0), spread=crossed(table))
    found = crossed(table, step)
    half = found.half_width()
    return replace(
        plain, low=mean - half, high=mean + half, p=found.p(mean), bootstrap=bootstrap(table), spread=found
    )  # fmt: skip


def grown(log: float) -> float:
    """exp(log) - 1, of a ratio as far as a float can have it."""
    return math.expm1(min(log, 700.0))


def _in_units(logs: Effect, baseline: float) -> Effect:
    """`logs` in the metric's units; half widths, which are not symmetric on this scale, to first order."""

    def in_units(log: float | None) -> float | None:
        return None if log is None else baseline * grown(log)

    booted = logs.bootstrap and (baseline * grown(logs.bootstrap[0]), baseline * grown(logs.bootstrap[1]))
    return replace(
        logs,
        difference=baseline * grown(logs.estimate),
        low=in_units(logs.low),
        high=in_units(logs.high),
        bootstrap=booted,
        unpaired=None if logs.unpaired is None else baseline * logs.unpaired,
        unpaired_seeds=None if logs.unpaired_seeds is None else baseline * logs.unpaired_seeds,
        ratio=True,
    )


# --- without pairing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A share of the variance of a mean, with the degrees of freedom that it was estimated with."""

    variance: float
    df: int


def unpaired_half_widths(arm: Array, baseline: Array) -> tuple[float | None, float | None]:
    """Half the widths of the interval if the arms had other seeds and items, and if they had other seeds alone."""
    sides = [_parts(crossed(table)) for table in (arm, baseline)]
    everything = _half_width([part for side in sides for part in side]) or None
    if len(arm) == 1:
        return everything, None
    of_seeds = [side[0] for side in sides]
    return everything, _half_width([*of_seeds, *_parts(crossed(arm - baseline))[1:]]) or None


def _parts(found: Crossed) -> list[Part]:
    """What seeds add to the variance of the mean, and what items add to it."""
    of_seeds = [Part(found.of_seeds, found.seeds - 1)] if found.seeds > 1 else []
    of_items = [Part(max(found.of_items - found.of_both, 0.0), found.items - 1)] if found.items > 1 else []
    return of_seeds + of_items


def _half_width(parts: Sequence[Part]) -> float:
    """Of Welch's interval, with [Satterthwaite]'s degrees of freedom, computed from the parts' shares because the
    square of a variance can underflow.
    """
    whole = sum(part.variance for part in parts)
    if not whole:
        return 0.0
    df = 1 / sum((part.variance / whole) ** 2 / part.df for part in parts)
    return critical_t(df) * math.sqrt(whole)


def bootstrap(table: Array, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile interval of the mean of `table` [S, I]. Seeds and items are resampled independently, each with
    replacement, so that values of one seed or one item move together ([Owen]). Equal tables give equal intervals.
    """
    random = np.random.default_rng(0)
    rows, columns = (random.multinomial(n, np.full(n, 1 / n), resamples) / n for n in table.shape)
    means = ((rows @ table) * columns).sum(1)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def holm(p: Sequence[float], possible: int | None = None) -> list[float]:
    """Adjusted p of several claims, in their order. If every p below 0.05 counts as a finding, the chance of any false
    finding is at most 5 % ([Holm]). The smallest p is multiplied by n, the next by n - 1 and so on; none is less than
    the one before, or more than 1.

    `possible`: how many of the claims can be false at once, where not all can ([Shaffer]); no p is multiplied by more.
    """
    adjusted, least = [0.0] * len(p), 0.0
    most = len(p) if possible is None else possible
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, min(most, len(p) - place) * p[i]))
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
    logs = np.log(np.array(arm) / np.array(baseline))[:, None]
    middle = float(logs.mean())
    if len(logs) == 1:
        return math.exp(middle), None, None
    half = crossed(logs).half_width()
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)
