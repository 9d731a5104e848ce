"""From the runs of a sweep to its answer: which arm is better than the baseline, by how much, and how sure that is."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean, median

import numpy as np

from nai_xl.compare.paired import (
    Array,
    Effect,
    better_direction,
    effect,
    first_reached,
    holm,
    ratio,
    verdict,
)
from nai_xl.compare.runs import Run, different_keys
from nai_xl.errors import UserError

TARGET_METRIC = "val/loss"
FAILED, NOT_MEASURED, NO_PAIRS = "failed", "not measured", "no pairs"
NOT_OF_THE_METHOD = ("run.seed", "name", "output_dir", "sweep.", "tracker.", "hydra.")  # config that tells arms nothing


@dataclass(frozen=True)
class Question:
    """What a sweep asks: from the node `sweep` of its experiment."""

    name: str
    question: str = ""
    baseline: str = ""  # 'schedule=ztsnr,loss=minsnr'; empty: the first arm
    metrics: Sequence[str] = ()  # empty: all that evaluators measured


@dataclass(frozen=True)
class Arm:
    """All runs of one combination of choices."""

    label: str
    choices: Mapping[str, str]
    runs: Mapping[int, Run]  # seed -> a run that did not fail
    failed: Sequence[Run] = ()

    @property
    def first(self) -> Run | None:
        """Any run: for what all of them share."""
        return next(iter([*self.runs.values(), *self.failed]), None)


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


@dataclass(frozen=True)
class Target:
    """Images that an arm needed for the baseline's last value of a metric, seed by seed."""

    arm: str
    metric: str
    images: Mapping[int, float | None]  # seed -> images; None: not reached
    baseline_images: Mapping[int, float]
    ratio: tuple[float, float | None, float | None] | None  # with its 95 % interval; None unless every seed got there


@dataclass(frozen=True)
class Cost:
    """Means over an arm's runs, None where nothing was noted."""

    arm: str
    runs: int
    seconds: float | None
    images: float | None
    images_per_second: float | None
    peak_memory_gib: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything that the report shows."""

    asked: Question
    baseline: str
    arms: Sequence[Arm]  # the baseline first
    metrics: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=tuple)

    @cached_property
    def names(self) -> dict[str, str]:
        """Each arm's label -> as few words as tell it from the others: 'ztsnr + minsnr', 'gamma=5'."""
        keys = dict.fromkeys(key for arm in self.arms for key in arm.choices)
        varied = [key for key in keys if len({arm.choices.get(key) for arm in self.arms}) > 1]
        short = {
            arm.label: _in_short({key: arm.choices[key] for key in varied if key in arm.choices}) for arm in self.arms
        }
        return short if len({*short.values()} - {""}) == len(short) else {label: label for label in short}

    @cached_property
    def targets(self) -> list[Target]:
        """Empty where no validation loss was measured."""
        return [found for arm in self.arms[1:] if (found := images_to_target(arm, self.arms[0])) is not None]

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


def _in_short(choices: Mapping[str, str]) -> str:
    """Values that say something by themselves, such as a group's option; others with the end of their key.

    Keys of one end, native.resolution and schedule.resolution, are told in full.
    """
    ends = Counter(key.rpartition(".")[2] for key in choices)

    def told(key: str, value: str) -> str:
        end = key.rpartition(".")[2]
        bare = value in ("true", "false", "null", "none", "[]") or re.fullmatch(r"[-+.\deE]+", value)
        return f"{end if ends[end] == 1 else key}={value}" if bare or "." in key else value

    return " + ".join(told(key, value) for key, value in choices.items())


def compare(runs: Sequence[Run], asked: Question) -> Comparison:
    """Raises UserError when there is nothing to compare: one arm, an unknown baseline, no metric in common."""
    arms, notes = group(runs)
    if len(arms) < 2:
        raise UserError(
            f"{asked.name} has one arm only ({arms[0].label if arms else 'no run'}); name runs that differ "
            "in more than run.seed, or train the others"
        )
    baseline = find_baseline(arms, asked.baseline)
    arms = [baseline, *(arm for arm in arms if arm is not baseline)]
    if not asked.baseline:
        notes = [*notes, f"no baseline was named, so {baseline.label} is it; baseline=ARM names another"]
    metrics, absent = choose_metrics(arms, asked.metrics)
    notes = [*notes, *(f"{metric} was measured in no run" for metric in absent)]
    rows = [measure(metric, arm, baseline) for metric in metrics for arm in arms[1:]]
    return Comparison(asked, baseline.label, arms, metrics, judged(rows), notes)


def group(runs: Sequence[Run]) -> tuple[list[Arm], list[str]]:
    """Arms in a natural order of their labels, and notes on runs left out: of an arm and seed the last one counts."""
    by_arm: dict[str, dict[int, Run]] = {}
    notes = []
    for run in runs:
        seeds = by_arm.setdefault(run.label, {})
        if (before := seeds.get(run.seed)) is not None:
            notes.append(f"{run.label} has seed {run.seed} twice: {run.name} counts, {before.name} is left out")
        seeds[run.seed] = run
    arms = []
    for label in sorted(by_arm, key=_natural):
        seeds = dict(sorted(by_arm[label].items()))
        whole = {seed: run for seed, run in seeds.items() if not run.failed}
        failed = [run for run in seeds.values() if run.failed]
        arms.append(Arm(label, next(iter(seeds.values())).arm, whole, failed))
    return arms, notes


def _natural(label: str) -> list[tuple[bool, float, str]]:
    """gamma=5 before gamma=20."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", label)
    return [(not i % 2, float(part) if i % 2 else 0.0, part) for i, part in enumerate(parts)]


def find_baseline(arms: Sequence[Arm], named: str) -> Arm:
    """The arm that 'key=value,key=value' names, all of its keys or enough of them. Raises UserError."""
    if not named:
        return arms[0]
    wanted = {part.strip() for part in re.split(r",(?![^\[]*\])", named)}
    found = [arm for arm in arms if wanted <= {f"{key}={value}" for key, value in arm.choices.items()}]
    found = found or [arm for arm in arms if named == arm.label]
    if len(found) != 1:
        known = "; ".join(arm.label.replace(", ", ",") for arm in arms)
        what = "no arm" if not found else f"{len(found)} arms"
        raise UserError(f"baseline={named} is {what} of this sweep; there is {known}")
    return found[0]


def choose_metrics(arms: Sequence[Arm], named: Sequence[str]) -> tuple[list[str], list[str]]:
    """The metrics to compare, and those asked for that no run has. Unnamed: what evaluators measured without the parts
    of a metric, as val/loss_band_0_250 is one of val/loss; or else the training loss. Raises UserError without any.
    """
    known = dict.fromkeys(name for arm in arms for run in arm.runs.values() for name in run.curves)
    if named:
        chosen = [name for name in named if name in known]
    else:
        whole = [name for name in known if not name.startswith(("train/", "perf/"))]
        chosen = [name for name in whole if not any(name.startswith(f"{other}_") for other in whole)]
        chosen = chosen or [name for name in ("train/loss",) if name in known]
    if not chosen:
        errors = dict.fromkeys(f"{arm.label}: {run.error}" for arm in arms for run in arm.failed)
        why = f"there is {', '.join(known)}" if known else "no run that did not fail has any number"
        raise UserError("\n".join([f"nothing to compare: {why}; set metrics=a,b", *errors]))
    return chosen, [name for name in named if name not in known]


# --- one metric of one arm --------------------------------------------------------------------------------------------


def measure(metric: str, arm: Arm, baseline: Arm) -> Row:
    """The row without what depends on all the others: Holm's adjustment and the verdict."""
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
        images=step * next(iter(finite.values()))[0].images_per_step,
        notes=notes,
    )


def last_common_step(metric: str, runs: Sequence[Run]) -> int | None:
    """The last step at which all of these runs have the metric; None without one."""
    shared = set.intersection(*(set(run.curves[metric]) for run in runs)) if runs else set()
    return max(shared, default=None)


def item_tables(metric: str, pairs: Sequence[tuple[Run, Run]], step: int) -> tuple[Array, Array] | None:
    """[S, I] of both sides over the items that all runs share; None where the metric is not the mean of its items."""
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


def _failures(arm: Arm, who: str = "") -> list[str]:
    return [f"{who}failed with seed {run.seed}: {run.error or 'no reason noted'}" for run in arm.failed]


def _remarks(
    metric: str,
    arm: Arm,
    baseline: Arm,
    pairs: Mapping[int, object],
    finite: Mapping[int, object],
    step: int,
) -> Iterator[str]:
    """What a reader must know of this row."""
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


def judged(rows: Sequence[Row]) -> list[Row]:
    """Rows with Holm's adjustment over all arms and metrics, and their verdicts. A single seed is not judged: its
    interval, where there are items, tells nothing of another seed.
    """
    tested = [row for row in rows if row.effect is not None and row.effect.p is not None and row.effect.seeds > 1]
    adjusted = dict(zip(map(id, tested), holm([row.effect.p or 0.0 for row in tested if row.effect]), strict=True))
    done = []
    for row in rows:
        if row.effect is None:
            done.append(row)
            continue
        p = adjusted.get(id(row))
        words = verdict(row.metric, row.effect.difference, p)
        done.append(replace(row, p_holm=p, verdict=words))
    return done


# --- beside the metrics -----------------------------------------------------------------------------------------------


def images_to_target(arm: Arm, baseline: Arm, metric: str = TARGET_METRIC) -> Target | None:
    """Images to the baseline's last value, seed by seed; None where the metric is missing.

    A description, not a test: an arm that is no better misses its target half of the time, so that the ratio of those
    that reach it in every seed leans to the good side.
    """
    good = better_direction(metric) or "lower"
    reached: dict[int, float | None] = {}
    theirs: dict[int, float] = {}
    for seed in (seed for seed in arm.runs if seed in baseline.runs):
        run, other = arm.runs[seed], baseline.runs[seed]
        if not run.curves.get(metric) or not other.curves.get(metric):
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


def cost(arm: Arm) -> Cost:
    """Seconds and images from arm.json, the rest from perf/ metrics: the median report's speed, the highest memory."""
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
