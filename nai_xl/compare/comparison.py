"""From the runs of a sweep to its answer: which arm is better than the baseline, by how much, and how sure that is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from nai_xl.compare.arms import ArmRuns, choose_metrics, find_baseline, group, short_names
from nai_xl.compare.costs import TARGET_METRIC, Cost, Target, cost, images_to_target
from nai_xl.compare.judging.comparable import hindrances, plan_note, settings, varied
from nai_xl.compare.judging.factorial import Contrast, contrasts
from nai_xl.compare.judging.looks import judged_at_look, told
from nai_xl.compare.judging.rows import Row, judged, measure
from nai_xl.compare.judging.verdicts import Directions, Margins, Scopes, better_direction, declared
from nai_xl.compare.question import Question
from nai_xl.compare.runs.run import Run
from nai_xl.compare.statistics.crossed import LEVEL
from nai_xl.errors import UserError
from nai_xl.record.looks import Look

NEITHER = "no direction of it is declared good"


@dataclass(frozen=True)
class Comparison:
    """Everything that the report shows."""

    asked: Question
    baseline: str
    arms: Sequence[ArmRuns]  # the baseline first
    metrics: Sequence[str]
    rows: Sequence[Row]
    directions: Directions  # which values of the metrics are better
    notes: Sequence[str] = field(default_factory=tuple)
    looks: Sequence[Look] = ()  # at the sweep, the present one last; empty if they are not recorded
    scopes: Scopes | None = None  # settings over which metrics keep no meaning

    @cached_property
    def names(self) -> dict[str, str]:
        """Each arm's label -> as few words as tell it from the others: 'ztsnr + minsnr', 'gamma=5'."""
        return short_names(self.arms)

    @cached_property
    def targets(self) -> list[Target]:
        """Empty if no validation loss was measured, or if it keeps no meaning between these arms and was not named."""
        if TARGET_METRIC not in self.asked.metrics and hindrances(TARGET_METRIC, varied(self.arms), self.scopes):
            return []
        found = (images_to_target(arm, self.arms[0], self.directions) for arm in self.arms[1:])
        return [target for target in found if target is not None]

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Main effects and interactions, where the arms are a full grid; of the metrics that are judged."""
        judged = [metric for metric in self.metrics if any(row.withheld != NEITHER for row in self.of(metric))]
        return contrasts(self.arms, judged, self.directions, min((row.level for row in self.rows), default=LEVEL))

    @cached_property
    def costs(self) -> list[Cost]:
        return [cost(arm) for arm in self.arms]

    @cached_property
    def differences(self) -> dict[str, list[object]]:
        """config key -> its value in each arm, for the keys that arms differ in."""
        return settings(self.arms)

    def baseline_mean(self, metric: str) -> float | None:
        """Over the seeds that it shares with the arm that has most of them."""
        known = [row for row in self.of(metric) if row.baseline_mean is not None]
        return max(known, key=lambda row: len(row.seeds)).baseline_mean if known else None

    def of(self, metric: str) -> list[Row]:
        return [row for row in self.rows if row.metric == metric]


def compare(
    runs: Sequence[Run],
    asked: Question,
    directions: Directions | None = None,
    margins: Margins | None = None,
    looks: Sequence[Look] | None = None,
    scopes: Scopes | None = None,
) -> Comparison:
    """Compare the arms of `runs` with the baseline.

    `directions`, `margins` and `scopes`: from verdicts.declared, declared_margins and declared_scopes; without them,
    those of the project's own evaluators. `looks`: the earlier ones at this sweep, to which this one is added; None: it
    is judged by itself.

    Raises UserError when there is nothing to compare: one arm, an unknown baseline, no metric in common.
    """
    directions = declared(()) if directions is None else directions
    arms, notes = group(runs)
    if len(arms) < 2:
        raise UserError(
            f"{asked.name} has one arm only ({arms[0].label if arms else 'no run'}); name runs that differ "
            "in more than run.seed, or train the others"
        )
    baseline = find_baseline(arms, asked.baseline)
    arms = [baseline, *(arm for arm in arms if arm is not baseline)]
    if not asked.baseline:
        notes = [
            *notes,
            f"no baseline was named, so the first arm, {baseline.label}, is it; baseline=ARM names another",
        ]
    keys = varied(arms)
    metrics, remarks = choose_metrics(arms, asked.metrics, lambda metric: hindrances(metric, keys, scopes))
    notes = [*notes, *remarks, *plan_note(keys)]
    rows = [measure(metric, arm, baseline, directions) for metric in metrics for arm in arms[1:]]
    if not asked.metrics:  # what nobody asked for costs no verdict its certainty unless it can be better or worse
        rows = [
            row if better_direction(row.metric, directions) else replace(row, withheld=row.withheld or NEITHER)
            for row in rows
        ]
    ratios = dict.fromkeys(row.metric for row in rows if row.effect and row.effect.ratio)
    notes += [f"compared by the ratio of positive errors: {', '.join(ratios)}"] if ratios else []
    judge = functools.partial(judged, directions=directions, margins=margins, equivalence=asked.equivalence)
    if looks is None:
        return Comparison(asked, baseline.label, arms, metrics, judge(rows), directions, notes, scopes=scopes)
    rows, looks = judged_at_look(rows, arms, asked.plan, looks, judge)
    notes = [*notes, *told(looks, short_names(arms))]
    return Comparison(asked, baseline.label, arms, metrics, rows, directions, notes, looks, scopes)
