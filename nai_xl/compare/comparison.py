"""From the runs of a sweep to its answer: which arm is better than the baseline, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nai_xl.compare.arms import ArmRuns, choose_metrics, find_baseline, group, short_names
from nai_xl.compare.costs import Cost, Target, cost, images_to_target
from nai_xl.compare.rows import Row, judged, measure
from nai_xl.compare.runs.naming import NOT_OF_THE_METHOD, different_keys
from nai_xl.compare.runs.run import Run
from nai_xl.compare.verdicts import Directions, Margins, declared
from nai_xl.errors import UserError


@dataclass(frozen=True)
class Question:
    """What a sweep asks: from the node `sweep` of its experiment."""

    name: str
    question: str = ""
    baseline: str = ""  # 'schedule=ztsnr,loss=minsnr'; empty: the first arm
    metrics: Sequence[str] = ()  # empty: all that evaluators measured
    equivalence: str = ""  # "2%", or in the metrics' units; empty: what the metrics declare


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

    @cached_property
    def names(self) -> dict[str, str]:
        """Each arm's label -> as few words as tell it from the others: 'ztsnr + minsnr', 'gamma=5'."""
        return short_names(self.arms)

    @cached_property
    def targets(self) -> list[Target]:
        """Empty if no validation loss was measured."""
        found = (images_to_target(arm, self.arms[0], self.directions) for arm in self.arms[1:])
        return [target for target in found if target is not None]

    @cached_property
    def costs(self) -> list[Cost]:
        return [cost(arm) for arm in self.arms]

    @cached_property
    def differences(self) -> dict[str, list[object]]:
        """config key -> its value in each arm, for the keys that arms differ in."""
        firsts = [arm.first for arm in self.arms if arm.first is not None]
        configs = [run.config for run in firsts]
        keys = [key for key in different_keys(configs) if not key.startswith(NOT_OF_THE_METHOD)]
        keys = [key for key in keys if [config.get(key) for config in configs] != [run.seed for run in firsts]]
        return {key: [config.get(key) for config in configs] for key in keys}

    def of(self, metric: str) -> list[Row]:
        return [row for row in self.rows if row.metric == metric]


def compare(
    runs: Sequence[Run], asked: Question, directions: Directions | None = None, margins: Margins | None = None
) -> Comparison:
    """Compare the arms of `runs` with the baseline.

    `directions` and `margins`: from verdicts.declared and declared_margins; without them, those of the project's own
    evaluators. Raises UserError when
    there is nothing to compare: one arm, an unknown baseline, no metric in common.
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
        notes = [*notes, f"no baseline was named, so the first arm, {baseline.label}, is it; baseline=ARM names another"]
    metrics, absent = choose_metrics(arms, asked.metrics)
    notes = [*notes, *(f"{metric} was measured in no run" for metric in absent)]
    rows = [measure(metric, arm, baseline, directions) for metric in metrics for arm in arms[1:]]
    rows = judged(rows, directions, margins, asked.equivalence)
    return Comparison(asked, baseline.label, arms, metrics, rows, directions, notes)
