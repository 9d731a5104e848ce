"""How many seeds a question takes: from the spread of an earlier sweep, the differences that more of them would show.

The mean squares of a comparison predict those of one with other seeds (crossed.Crossed.with_seeds). A pilot of three
seeds knows its spread to a factor of two or so, and the numbers here are as uncertain.
"""

from __future__ import annotations

from dataclasses import dataclass

from nai_xl.compare.comparison import Comparison
from nai_xl.compare.costs import Cost
from nai_xl.compare.judging.rows import Row, on_tested_scale
from nai_xl.compare.statistics.paired import grown
from nai_xl.compare.wording import in_words, number, percent_of

SEEDS = (3, 5, 10, 20)  # of the table


@dataclass(frozen=True)
class Power:
    """What an arm's paired runs say of further ones, for one metric."""

    metric: str
    arm: str
    seeds: int  # of the comparison
    items: int
    shown: dict[int, float]  # seeds -> the difference they show with a probability of 0.8
    relative: bool  # the differences are shares of the baseline, not in the metric's units
    wanted: int | None  # seeds that the wanted difference takes; None where none was asked for, or no number does
    minutes: float | None  # that the seeds beyond these would take, arm and baseline one after the other
    hopeless: str  # why no number of seeds was found

    def size(self, seeds: int) -> str:
        """The difference that so many seeds show: '0.8 %', or in the metric's units."""
        found = self.shown[seeds]
        return percent_of(100 * found, sign=False) if self.relative else number(found, digits=2)


def power(found: Comparison, wanted: str = "") -> list[Power]:
    """A row for each comparison of at least two seeds that do not agree completely.

    `wanted`: a difference such as "1%" of the baseline, or in the metric's units.
    """
    costs = {cost.arm: cost for cost in found.costs}
    rows = [row for row in found.rows if row.effect and row.effect.spread and row.effect.spread.of_seeds]
    return [_power(row, wanted, costs[row.arm], costs[found.baseline]) for row in rows if len(row.seeds) > 1]


def _power(row: Row, wanted: str, arm: Cost, baseline: Cost) -> Power:
    assert row.effect is not None and row.effect.spread is not None
    spread = row.effect.spread
    goal = on_tested_scale(row, wanted) if wanted else None
    seeds = spread.seeds_for(goal) if goal is not None else None
    hopeless = "is not shown by any number of seeds" + ("; more items might" if spread.items > 1 else "")
    if goal is None:
        hopeless = "is no size where the baseline is 0"
    minutes = None
    if seeds is not None and arm.seconds is not None and baseline.seconds is not None:
        minutes = max(0, seeds - spread.seeds) * (arm.seconds + baseline.seconds) / 60
    shown = {n: spread.detectable(n) for n in sorted({*SEEDS, spread.seeds})}
    relative = row.effect.ratio or bool(row.baseline_mean)
    return Power(
        row.metric,
        row.arm,
        spread.seeds,
        spread.items,
        {n: _share(row, size) for n, size in shown.items()},
        relative,
        seeds,
        minutes,
        hopeless,
    )


def _share(row: Row, size: float) -> float:
    """`size` of the tested scale as a share of the baseline, or as it is where the baseline is 0."""
    if row.effect is not None and row.effect.ratio:
        return grown(size)
    return size / abs(row.baseline_mean) if row.baseline_mean else size


def needed(found: Comparison) -> list[str]:
    """What the difference takes that the question wants to detect, a line for each metric and arm."""
    wanted = found.asked.detect
    lines = []
    for one in power(found, wanted) if wanted else ():
        of = f"{one.metric}, {found.names[one.arm]}: {in_words(wanted)}"
        if one.wanted is None:
            lines.append(f"{of} {one.hopeless}")
        elif one.wanted <= one.seeds:
            lines.append(f"{of} takes about {one.wanted} seeds, which are here")
        else:
            time = "" if one.minutes is None else f", {one.minutes:,.0f} minutes more of one machine"
            lines.append(f"{of} takes about {one.wanted} seeds, here are {one.seeds}{time}")
    return lines
