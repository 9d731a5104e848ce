"""What an arm cost, and how many images it needed to be as good as the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from nai_xl.compare.arms import ArmRuns
from nai_xl.compare.judging.verdicts import Directions, better_direction
from nai_xl.compare.statistics.paired import first_reached, ratio

TARGET_METRIC = "val/loss"


@dataclass(frozen=True)
class Target:
    """How many images an arm needed to reach the baseline's last value of a metric, seed by seed."""

    arm: str
    metric: str
    images: Mapping[int, float | None]  # seed -> images; None: not reached
    baseline_images: Mapping[int, float]
    ratio: tuple[float, float | None, float | None] | None  # with its 95 % interval; None unless every seed reached it


@dataclass(frozen=True)
class Cost:
    """Means over an arm's runs, and the highest of their peak memories. None if no run noted it."""

    arm: str
    runs: int
    seconds: float | None
    images: float | None
    images_per_second: float | None
    peak_memory_gib: float | None


def images_to_target(
    arm: ArmRuns, baseline: ArmRuns, directions: Directions, metric: str = TARGET_METRIC
) -> Target | None:
    """Images until the baseline's last value is reached, seed by seed; None if the metric is missing.

    A seed is left out unless both of its runs know how many images they have seen.

    This is a description, not a test. An arm that is no better misses its target half of the time, so the arms that
    reach it with every seed are a selection, and their ratios are too good.
    """
    good = better_direction(metric, directions) or "lower"
    reached: dict[int, float | None] = {}
    theirs: dict[int, float] = {}
    for seed in (seed for seed in arm.runs if seed in baseline.runs):
        run, other = arm.runs[seed], baseline.runs[seed]
        if not run.curves.get(metric) or not other.curves.get(metric):
            continue
        if run.images_per_step is None or other.images_per_step is None:
            continue
        target = other.curves[metric][max(other.curves[metric])]
        step, own = first_reached(run.curves[metric], target, good), first_reached(other.curves[metric], target, good)
        if own is None:  # the baseline ended in a value that is not finite
            continue
        reached[seed] = None if step is None else step * run.images_per_step
        theirs[seed] = own * other.images_per_step
    if not reached:
        return None
    arrived = [images for images in reached.values() if images]
    times = ratio(arrived, list(theirs.values())) if len(arrived) == len(reached) and all(theirs.values()) else None
    return Target(arm.label, metric, reached, theirs, times)


def cost(arm: ArmRuns) -> Cost:
    """Seconds and images from arm.json. A run's speed is the median of its reports, its memory the highest."""
    runs = list(arm.runs.values())
    speeds = [median(curve.values()) for run in runs if (curve := run.curves.get("perf/images_per_second"))]
    peaks = [max(curve.values()) for run in runs if (curve := run.curves.get("perf/peak_memory_gib"))]
    return Cost(
        arm.label,
        len(runs),
        _mean([run.seconds for run in runs]),
        _mean([run.images for run in runs]),
        _mean(speeds),
        max(peaks, default=None),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
