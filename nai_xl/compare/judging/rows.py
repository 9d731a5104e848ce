"""One metric of one arm against the baseline: which runs are paired, the difference, and what to know about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nai_xl.compare.arms import ArmRuns
from nai_xl.compare.judging.items import item_tables, unlike_items
from nai_xl.compare.judging.verdicts import (
    ERRORS_WITHIN,
    FAILED,
    IDENTICAL,
    NO_PAIRS,
    NO_VERDICT,
    NOT_MEASURED,
    ONE_SEED,
    TWO_SEEDS,
    UNDECIDED,
    Claims,
    Directions,
    Margins,
    better_direction,
    margin_of,
    parse_margin,
    verdict,
)  # fmt: skip
from nai_xl.compare.runs.run import Run
from nai_xl.compare.statistics.crossed import LEVEL
from nai_xl.compare.statistics.paired import Effect, effect, grown, holm
from nai_xl.compare.statistics.spending import LEAST_SEEDS, TINY


@dataclass(frozen=True)
class Row:
    """One metric of one arm against the baseline's."""

    metric: str
    arm: str
    verdict: str
    mean: float | None = None  # over the paired seeds
    baseline_mean: float | None = None
    effect: Effect | None = None
    p_holm: float | None = None  # that the arm differs
    p_equal: float | None = None  # that it differs by less than the margin; adjusted together with p_holm
    margin: str | None = None  # "2%", or in the metric's units
    seeds_needed: int | None = None  # of an undecided arm: about how many would decide, 0 where no number does
    seeds: Sequence[int] = ()
    step: int | None = None
    images: float | None = None
    withheld: str = ""  # why there is no verdict although there is a difference
    level: float = LEVEL  # which one of several looks may take; p_holm and p_equal are adjusted for that too
    notes: Sequence[str] = ()

    @property
    def percent(self) -> float | None:
        """The difference in per cent of the baseline's mean."""
        return None if self.effect is None else self.in_percent(self.effect.difference)

    @property
    def tested(self) -> bool:
        """Whether there is enough to test a claim."""
        e = self.effect
        return e is not None and e.p is not None and e.seeds >= LEAST_SEEDS and not self.withheld

    def in_percent(self, difference: float) -> float | None:
        return 100 * difference / abs(self.baseline_mean) if self.baseline_mean else None

    @property
    def tested_margin(self) -> float | None:
        """The margin on the scale of effect.estimate; None if there is none, or the baseline is 0."""
        return on_tested_scale(self, self.margin) if self.margin is not None else None

    @property
    def margin_in_units(self) -> float | None:
        """The margin in the metric's units, as it is above the baseline."""
        size = self.tested_margin
        if size is None or self.effect is None:
            return None
        return grown(size) * abs(self.baseline_mean or 0.0) if self.effect.ratio else size


def on_tested_scale(row: Row, size: str) -> float | None:
    """A difference such as "2%" or "0.1" on the scale of the row's effect.estimate; None if the baseline is 0."""
    value, share = parse_margin(size)
    mean = abs(row.baseline_mean or 0.0)
    if row.effect is None or (share and not mean):
        return None
    if row.effect.ratio:
        return math.log1p(value if share else value / mean)
    return value * mean if share else value


def measure(metric: str, arm: ArmRuns, baseline: ArmRuns, directions: Directions | None = None) -> Row:
    """The row without what depends on all the other rows, its adjusted p and its verdict; see `judged`.

    A metric whose lower values are better and whose values are all above 0 is an error: the arms are compared by the
    ratio of their errors, which a few large ones do not rule.
    """
    failures = _failures(arm)
    if not arm.runs:
        return Row(metric, arm.label, FAILED, notes=failures)
    if not any(metric in run.curves for run in arm.runs.values()):
        return Row(metric, arm.label, NOT_MEASURED, notes=failures)
    common = [seed for seed in arm.runs if seed in baseline.runs]
    common = [seed for seed in common if all(metric in side.runs[seed].curves for side in (arm, baseline))]
    pairs = {seed: (arm.runs[seed], baseline.runs[seed]) for seed in common}
    step = last_common_step(metric, [run for pair in pairs.values() for run in pair])
    if step is None:
        nothing = "no seed or no step in common with the baseline"
        return Row(metric, arm.label, NO_PAIRS, notes=[*failures, *_failures(baseline, "the baseline "), nothing])
    finite = {
        seed: pair for seed, pair in pairs.items() if all(math.isfinite(run.curves[metric][step]) for run in pair)
    }
    notes = [*failures, *_remarks(metric, arm, baseline, pairs, finite, step)]
    if not finite:
        return Row(metric, arm.label, NO_PAIRS, step=step, notes=notes)
    means = [np.array([pair[side].curves[metric][step] for pair in finite.values()]) for side in (0, 1)]
    tables = item_tables(metric, list(finite.values()), step)
    first, second = (tables.arm, tables.baseline) if tables is not None else (values[:, None] for values in means)
    missing, remark = unlike_items(metric, list(finite.values()), step) if tables is None else (tables.missing, "")
    notes += [remark] if remark else []
    if missing:
        notes.append(f"{missing} items are not in every run: left out")
    error = better_direction(metric, directions) == "lower"
    return Row(
        metric,
        arm.label,
        verdict="",
        mean=float(means[0].mean()),
        baseline_mean=float(means[1].mean()),
        effect=effect(first, second, ratio=error and bool((first > 0).all() and (second > 0).all())),
        seeds=list(finite),
        step=step,
        images=_images(step, list(finite.values())),
        withheld=_withheld(arm, baseline, [seed for seed in pairs if seed not in finite], missing),
        notes=notes,
    )


def _withheld(arm: ArmRuns, baseline: ArmRuns, infinite: Sequence[int], missing: int) -> str:
    """Why what is left of the runs is a selection that must not be judged; '' where nothing is wrong.

    Runs seldom fail by chance: an arm that diverges with one seed of four is not known by its other three.
    """
    reasons = [
        f"{len(side.failed)} of {len(side.failed) + len(side.runs)} runs of {who} failed"
        for side, who in ((arm, "this arm"), (baseline, "the baseline"))
        if side.failed
    ]
    reasons += [f"not finite with {_seeds(infinite)}"] if infinite else []
    reasons += [f"{missing} items are not in every run"] if missing else []
    return ", ".join(reasons)


def _images(step: int, pairs: Sequence[tuple[Run, Run]]) -> float | None:
    """How many images had been seen by `step`, by the arm or else by the baseline; None if no run of them knows."""
    runs = [pair[side] for side in (0, 1) for pair in pairs]
    return next((step * run.images_per_step for run in runs if run.images_per_step is not None), None)


def last_common_step(metric: str, runs: Sequence[Run]) -> int | None:
    """The last step at which all of these runs have the metric; None if there is none."""
    shared = set.intersection(*(set(run.curves[metric]) for run in runs)) if runs else set()
    return max(shared, default=None)


def _failures(arm: ArmRuns, who: str = "") -> list[str]:
    return [f"{who}failed with seed {run.seed}: {run.error or 'no reason noted'}" for run in arm.failed]


def _remarks(
    metric: str,
    arm: ArmRuns,
    baseline: ArmRuns,
    pairs: Mapping[int, object],
    finite: Mapping[int, object],
    step: int,
) -> Iterator[str]:
    """What a reader must know about this row."""
    for side, name in ((arm, "this arm"), (baseline, "the baseline")):
        told = {run.seed for run in [*arm.failed, *baseline.failed]}
        only = [seed for seed in side.runs if seed not in pairs and seed not in told]
        if only:
            yield f"{_seeds(only)} only in {name}: left out"
    yield from _failures(baseline, "the baseline ")
    if len(finite) < len(pairs):
        lost = [seed for seed in pairs if seed not in finite]
        yield f"not finite with {_seeds(lost)}: left out"
    last = max(max(side.runs[seed].curves[metric]) for seed in pairs for side in (arm, baseline))
    if step < last:
        yield f"compared at step {step}, the last in common; one side goes on to {last}"
    if any(side.runs[seed].status == "RUNNING" for seed in pairs for side in (arm, baseline)):
        yield "still running"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def judged(
    rows: Sequence[Row],
    directions: Directions | None = None,
    margins: Margins | None = None,
    equivalence: str = "",
    level: float = LEVEL,
) -> list[Row]:
    """Rows with adjusted p and verdicts. Of each row two claims are tested, that the arm differs and that it differs by
    less than the margin. They cannot both be false, so that at most half of all claims are: with Holm's adjustment over
    all rows, the chance of any false verdict in the report is at most `level`.

    `equivalence` is every metric's margin in place of the declared ones. Fewer than LEAST_SEEDS are not judged.
    """
    rows = [replace(row, margin=equivalence or _margin(row, directions, margins)) for row in rows]
    claims = [claim for place, row in enumerate(rows) for claim in _claims(place, row)]
    adjusted = holm([p for *_, p in claims], possible=len({place for place, *_ in claims}))
    found = {(place, what): p for (place, what, _), p in zip(claims, adjusted, strict=True)}
    each = 1 / max(1, len({place for place, *_ in claims}))  # of the level, if all others are undecided too
    return [
        _judged(row, found.get((place, "different")), found.get((place, "equal")), directions, level, each)
        for place, row in enumerate(rows)
    ]


def _claims(place: int, row: Row) -> Iterator[tuple[int, str, float]]:
    """The claims about a row that are tested, with their p, of which 0.05 is the row's level; none where it cannot be
    judged.
    """
    e, times = row.effect, LEVEL / max(row.level, TINY)
    if e is None or e.p is None or not row.tested:
        return
    yield place, "different", min(e.p * times, 1.0)
    if (margin := row.tested_margin) is not None and (p := e.equal_p(margin)) is not None:
        yield place, "equal", min(p * times, 1.0)


def _margin(row: Row, directions: Directions | None, margins: Margins | None) -> str | None:
    declared = margin_of(row.metric, margins)
    return ERRORS_WITHIN if declared is None and row.effect and row.effect.ratio else declared


def _judged(
    row: Row, different: float | None, equal: float | None, directions: Directions | None, level: float, share: float
) -> Row:
    if row.effect is None:
        return row
    if row.withheld:
        return replace(row, verdict=NO_VERDICT)
    if row.effect.low == row.effect.high == 0:  # every number is the same: one seed is enough to see that
        return replace(row, p_holm=different, p_equal=equal, verdict=IDENTICAL)
    if different is None:
        return replace(row, verdict=ONE_SEED if row.effect.seeds == 1 else TWO_SEEDS)
    words = verdict(row.metric, row.effect.difference, Claims(different, equal), directions, level)
    needed = row.effect.seeds_to_decide(row.tested_margin, share * row.level) or 0 if words == UNDECIDED else None
    return replace(row, p_holm=different, p_equal=equal, verdict=words, seeds_needed=needed)
