"""Main effects and interactions, where the arms are a full grid over two or more keys.

The main effect of a value is its difference to the baseline's value, averaged over all settings of the other keys. The
interaction of two values is how much larger one's effect is where the other is set, in place of the baseline's; it is 0
where effects add up or, for positive errors, which are compared by ratios, where they multiply. Each is a contrast of
the same tables of seeds x items that arms are compared by, so it has the same statistic: Fisher, The Design of
Experiments (1935), chapter 6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nai_xl.compare.arms import ArmRuns
from nai_xl.compare.judging.items import item_tables
from nai_xl.compare.judging.rows import last_common_step
from nai_xl.compare.judging.verdicts import UNDECIDED, Claims, Directions, better_direction, verdict
from nai_xl.compare.statistics.crossed import LEVEL, Array
from nai_xl.compare.statistics.paired import Effect, effect, holm
from nai_xl.compare.statistics.spending import LEAST_SEEDS, TINY

SHOWN = "shown"  # of an interaction, which is neither better nor worse

Grid = Mapping[str, Sequence[str]]  # key -> its values, the baseline's first
Tables = Mapping[tuple[str, ...], Array]  # the values of the grid's keys -> [S, I]


@dataclass(frozen=True)
class Contrast:
    """One main effect or interaction. p_holm is adjusted among all contrasts of the report, and only them."""

    metric: str
    name: str  # "loss=minsnr", or "loss=minsnr x schedule=ztsnr"
    effect: Effect
    base: float  # of which a ratio's difference is a share
    interaction: bool = False
    p_holm: float | None = None
    verdict: str = "too few seeds"

    @property
    def percent(self) -> tuple[float, float, float] | None:
        """The effect and its 95 % interval in per cent, where errors are compared by their ratio."""
        e = self.effect
        if not e.ratio or e.low is None or e.high is None:
            return None
        return 100 * e.difference / self.base, 100 * e.low / self.base, 100 * e.high / self.base


def grid_of(arms: Sequence[ArmRuns]) -> Grid:
    """The keys that vary, if there are two or more of them and every combination of their values is an arm; else {}."""
    keys = [key for key in arms[0].choices if len({arm.choices.get(key) for arm in arms}) > 1]
    points = [tuple(arm.choices.get(key, "") for key in keys) for arm in arms]
    values = {key: list(dict.fromkeys(column)) for key, column in zip(keys, zip(*points, strict=True), strict=True)}
    whole = len(keys) > 1 and sorted(points) == sorted(itertools.product(*values.values()))
    return values if whole and all(arm.choices.keys() == arms[0].choices.keys() for arm in arms) else {}


def contrasts(
    arms: Sequence[ArmRuns], metrics: Sequence[str], directions: Directions | None = None, level: float = LEVEL
) -> list[Contrast]:
    """Of arms with the baseline first, judged at the `level` that this look may take. Empty unless they are a full
    grid; metrics that a run lacks are left out.
    """
    grid = grid_of(arms)
    found = [one for metric in metrics if grid for one in _of_metric(metric, arms, grid, directions)]
    tested = [one for one in found if one.effect.p is not None and one.effect.seeds >= LEAST_SEEDS]
    times = LEVEL / max(level, TINY)
    adjusted = iter(holm([min(1.0, times * (one.effect.p or 0.0)) for one in tested]))
    return [_judged(one, next(adjusted), directions) if one in tested else one for one in found]


def _judged(one: Contrast, p: float, directions: Directions | None) -> Contrast:
    words = verdict(one.metric, one.effect.difference, Claims(p), directions)
    if one.interaction and words != UNDECIDED:
        words = SHOWN
    return replace(one, p_holm=p, verdict=words if p < LEVEL else UNDECIDED)


def _of_metric(metric: str, arms: Sequence[ArmRuns], grid: Grid, directions: Directions | None) -> Iterator[Contrast]:
    tables = _tables(metric, arms, list(grid))
    if tables is None:
        return
    error = better_direction(metric, directions) == "lower"
    ratio = error and all(bool((table > 0).all()) for table in tables.values())
    cells = _Cells(tables, list(grid), ratio)
    base = {key: values[0] for key, values in grid.items()}
    for key, values in grid.items():
        for value in values[1:]:
            after, before = cells.mean({key: value}), cells.mean({key: base[key]})
            yield _contrast(metric, f"{key}={value}", after, before, ratio, interaction=False)
    for one, other in itertools.combinations(grid, 2):
        for a, b in itertools.product(grid[one][1:], grid[other][1:]):
            both, neither = cells.mean({one: a, other: b}), cells.mean({one: base[one], other: base[other]})
            first, second = cells.mean({one: a, other: base[other]}), cells.mean({one: base[one], other: b})
            sides = (both * neither, first * second) if ratio else (both + neither, first + second)
            yield _contrast(metric, f"{one}={a} x {other}={b}", *sides, ratio, interaction=True)


def _contrast(metric: str, name: str, after: Array, before: Array, ratio: bool, *, interaction: bool) -> Contrast:
    return Contrast(metric, name, effect(after, before, ratio=ratio), float(before.mean()), interaction)


@dataclass(frozen=True)
class _Cells:
    """The grid's tables, to be averaged over settings: geometrically where ratios are compared."""

    tables: Tables
    keys: Sequence[str]
    ratio: bool

    def mean(self, values: Mapping[str, str]) -> Array:
        """[S, I] over all arms that have these values."""
        wanted = [(self.keys.index(key), value) for key, value in values.items()]
        chosen = [table for point, table in self.tables.items() if all(point[i] == value for i, value in wanted)]
        stacked = np.stack(chosen)
        mean: Array = np.exp(np.log(stacked).mean(0)) if self.ratio else stacked.mean(0)
        return mean


def _tables(metric: str, arms: Sequence[ArmRuns], keys: Sequence[str]) -> Tables | None:
    """Each arm's values at the last step that all runs have; None where a run failed or lacks items or values."""
    seeds = list(arms[0].runs)
    runs = [[arm.runs.get(seed) for seed in seeds] for arm in arms]
    everyone = [run for row in runs for run in row if run is not None and metric in run.curves]
    step = last_common_step(metric, everyone)
    if step is None or len(everyone) < len(seeds) * len(arms) or any(arm.failed for arm in arms):
        return None
    if not all(math.isfinite(run.curves[metric][step]) for run in everyone):
        return None
    points = [tuple(arm.choices[key] for key in keys) for arm in arms]
    pairs = [[(arm.runs[seed], arms[0].runs[seed]) for seed in seeds] for arm in arms]
    by_item = [found for arm in pairs if (found := item_tables(metric, arm, step)) is not None]
    if len(by_item) == len(arms):
        tables = [found.arm for found in by_item]
        return None if any(found.missing for found in by_item) else dict(zip(points, tables, strict=True))
    means = [np.array([[one.curves[metric][step]] for one, _ in arm]) for arm in pairs]
    return dict(zip(points, means, strict=True))
