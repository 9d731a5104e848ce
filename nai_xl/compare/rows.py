"""One metric of one arm against the baseline: which runs are paired, the difference, and what to know about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from nai_xl.compare.arms import ArmRuns
from nai_xl.compare.paired import Array, Effect, effect, holm
from nai_xl.compare.runs.run import Run
from nai_xl.compare.verdicts import FAILED, NO_PAIRS, NOT_MEASURED, Directions, verdict


@dataclass(frozen=True)
class Row:
    """One metric of one arm against the baseline's."""

    metric: str
    arm: str
    verdict: str
    mean: float | None = None  # over the paired seeds
    baseline_mean: float | None = None
    effect: Effect | None = None
    p_holm: float | None = None
    seeds: Sequence[int] = ()
    step: int | None = None
    images: float | None = None
    notes: Sequence[str] = ()

    @property
    def percent(self) -> float | None:
        """The difference in per cent of the baseline's mean."""
        if self.effect is None or not self.baseline_mean:
            return None
        return 100 * self.effect.difference / abs(self.baseline_mean)


def measure(metric: str, arm: ArmRuns, baseline: ArmRuns) -> Row:
    """The row without Holm's adjustment and the verdict, which depend on all the other rows; see `judged`."""
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
    first, second = tables if tables is not None else (values[:, None] for values in means)
    return Row(
        metric,
        arm.label,
        verdict="",
        mean=float(means[0].mean()),
        baseline_mean=float(means[1].mean()),
        effect=effect(first, second),
        seeds=list(finite),
        step=step,
        images=_images(step, list(finite.values())),
        notes=notes,
    )


def _images(step: int, pairs: Sequence[tuple[Run, Run]]) -> float | None:
    """How many images had been seen by `step`, by the arm or else by the baseline; None if no run of them knows."""
    runs = [pair[side] for side in (0, 1) for pair in pairs]
    return next((step * run.images_per_step for run in runs if run.images_per_step is not None), None)


def last_common_step(metric: str, runs: Sequence[Run]) -> int | None:
    """The last step at which all of these runs have the metric; None if there is none."""
    shared = set.intersection(*(set(run.curves[metric]) for run in runs)) if runs else set()
    return max(shared, default=None)


def item_tables(metric: str, pairs: Sequence[tuple[Run, Run]], step: int) -> tuple[Array, Array] | None:
    """[S, I] of both sides over the items that all runs share; None if the metric is not the mean of its items."""
    rows = [[run.items(metric).get(step, {}) for run in pair] for pair in pairs]
    shared = sorted(set.intersection(*(set(row) for pair in rows for row in pair)))
    for pair, values in zip(pairs, rows, strict=True):
        for run, row in zip(pair, values, strict=True):
            if not row or not math.isclose(fmean(row.values()), run.curves[metric][step], rel_tol=1e-3, abs_tol=1e-9):
                return None
    if len(shared) < 2:
        return None
    first, second = (np.array([[pair[side][item] for item in shared] for pair in rows]) for side in (0, 1))
    return first, second


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
        yield f"not finite with {_seeds(lost)}: left out, which flatters one side"
    last = max(max(side.runs[seed].curves[metric]) for seed in pairs for side in (arm, baseline))
    if step < last:
        yield f"compared at step {step}, the last in common; one side goes on to {last}"
    if any(side.runs[seed].status == "RUNNING" for seed in pairs for side in (arm, baseline)):
        yield "still running"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def judged(rows: Sequence[Row], directions: Directions) -> list[Row]:
    """Rows with Holm's adjustment over all arms and metrics, and with their verdicts.

    A single seed is not judged. If the metric has items, there is an interval, but it says nothing about other seeds.
    """
    tested = [row for row in rows if row.effect is not None and row.effect.p is not None and row.effect.seeds > 1]
    adjusted = dict(zip(map(id, tested), holm([row.effect.p or 0.0 for row in tested if row.effect]), strict=True))
    done = []
    for row in rows:
        if row.effect is None:
            done.append(row)
            continue
        p = adjusted.get(id(row))
        words = verdict(row.metric, row.effect.difference, p, directions)
        done.append(replace(row, p_holm=p, verdict=words))
    return done
