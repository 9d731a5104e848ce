"""The arms of a sweep: its runs grouped by their choices, which arm is the baseline, and what can be compared."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from nai_xl.compare.runs.run import Run
from nai_xl.errors import UserError


@dataclass(frozen=True)
class ArmRuns:
    """All runs of one arm, that is, of one combination of choices."""

    label: str
    choices: Mapping[str, str]
    runs: Mapping[int, Run]  # seed -> a run that did not fail
    failed: Sequence[Run] = ()

    @property
    def first(self) -> Run | None:
        """One of the runs, to read what all of them share; None without any."""
        return next(iter([*self.runs.values(), *self.failed]), None)

    @property
    def images_per_step(self) -> float | None:
        """As the first of its runs that knows has it; None if none does."""
        return next((run.images_per_step for run in self.runs.values() if run.images_per_step is not None), None)


def group(runs: Sequence[Run]) -> tuple[list[ArmRuns], list[str]]:
    """Arms in the order in which their sweep was typed, and notes on the runs that are left out.

    Arms whose place is not known come last, in the natural order of their labels. Of several runs with one arm and
    seed, the last counts.
    """
    by_arm: dict[str, dict[int, Run]] = {}
    notes = []
    for run in runs:
        seeds = by_arm.setdefault(run.label, {})
        if (before := seeds.get(run.seed)) is not None:
            notes.append(f"{run.label} has seed {run.seed} twice: {run.name} counts, {before.name} is left out")
        seeds[run.seed] = run
    arms = []
    for label in sorted(by_arm, key=lambda label: (_place([*by_arm[label].values()]), _natural(label))):
        seeds = dict(sorted(by_arm[label].items()))
        whole = {seed: run for seed, run in seeds.items() if not run.failed}
        failed = [run for run in seeds.values() if run.failed]
        arms.append(ArmRuns(label, next(iter(seeds.values())).arm, whole, failed))
    return arms, notes


def _place(runs: Sequence[Run]) -> float:
    """The first place that a run of the arm has."""
    return min((run.place for run in runs if run.place is not None), default=math.inf)


def _natural(label: str) -> list[tuple[bool, float, str]]:
    """A sort key that puts gamma=5 before gamma=20."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", label)
    return [(not i % 2, float(part) if i % 2 else 0.0, part) for i, part in enumerate(parts)]


def find_baseline(arms: Sequence[ArmRuns], named: str) -> ArmRuns:
    """The arm that 'key=value,key=value' names, with all of its keys or with enough of them to tell it from the others.

    Without a name, the first arm. Raises UserError when none or several have that name.
    """
    if not named:
        return arms[0]
    wanted = {part.strip() for part in re.split(r",(?![^\[]*\])", named)}
    said = {arm.label: {f"{key}={value}" for key, value in arm.choices.items()} for arm in arms}
    found = [arm for arm in arms if wanted == said[arm.label]] or [arm for arm in arms if wanted <= said[arm.label]]
    found = found or [arm for arm in arms if named == arm.label]
    if len(found) != 1:
        known = "; ".join(arm.label.replace(", ", ",") for arm in arms)
        what = "no arm" if not found else f"{len(found)} arms"
        raise UserError(f"baseline={named} is {what} of this sweep; there is {known}")
    return found[0]


def choose_metrics(
    arms: Sequence[ArmRuns], named: Sequence[str], hindered: Callable[[str], Sequence[str]]
) -> tuple[list[str], list[str]]:
    """The metrics to compare, and remarks on those that are not what a reader may think.

    Without names, all that evaluators measured are compared, except the parts of another metric, such as
    val/loss_band_0_250 of val/loss, and those that keep no meaning between these arms: `hindered` tells over which
    settings. If nothing was evaluated, it is the training loss. Raises UserError when there is no metric at all.
    """
    known = dict.fromkeys(name for arm in arms for run in arm.runs.values() for name in run.curves)
    unlike = {name: over for name in known if (over := hindered(name))}
    if named:
        chosen = [name for name in named if name in known]
        notes = [f"{name} was measured in no run" for name in named if name not in known]
        notes += [
            f"{_no_meaning(name, unlike[name])}, and is compared because it was named"
            for name in chosen
            if name in unlike
        ]
        return chosen or _nothing(arms, list(known), []), notes
    evaluated = [name for name in known if not name.startswith(("train/", "perf/"))] or ["train/loss"]
    whole = _whole([name for name in evaluated if name in known and name not in unlike])
    left_out = _whole([name for name in evaluated if name in unlike])
    notes = [
        f"{_no_meaning(name, unlike[name])}, and is left out; metrics={name} compares it all the same"
        for name in left_out
    ]
    return whole or _nothing(arms, list(known), notes), notes


def _whole(names: Sequence[str]) -> list[str]:
    """Those that are no part of another one."""
    return [name for name in names if not any(name.startswith(f"{other}_") for other in names)]


def _no_meaning(metric: str, over: Sequence[str]) -> str:
    return f"{metric} cannot be compared between arms of different {', '.join(over)}"


def _nothing(arms: Sequence[ArmRuns], known: Sequence[str], notes: Sequence[str]) -> NoReturn:
    errors = dict.fromkeys(f"{arm.label}: {run.error}" for arm in arms for run in arm.failed)
    why = f"there is {', '.join(known)}" if known else "no run that did not fail has any number"
    raise UserError("\n".join([f"nothing to compare: {why}; set metrics=a,b", *notes, *errors]))


def short_names(arms: Sequence[ArmRuns]) -> dict[str, str]:
    """Each arm's label -> as few words as tell it from the others: 'ztsnr + minsnr', 'gamma=5'."""
    keys = dict.fromkeys(key for arm in arms for key in arm.choices)
    varied = [key for key in keys if len({arm.choices.get(key) for arm in arms}) > 1]
    short = {arm.label: _in_short({key: arm.choices[key] for key in varied if key in arm.choices}) for arm in arms}
    return short if len({*short.values()} - {""}) == len(short) else {label: label for label in short}


def _in_short(choices: Mapping[str, str]) -> str:
    """A value alone if it is clear by itself, as a group's option is; others with the last part of their key.

    Keys with the same last part, such as native.resolution and schedule.resolution, are written in full.
    """
    ends = Counter(key.rpartition(".")[2] for key in choices)

    def in_short(key: str, value: str) -> str:
        end = key.rpartition(".")[2]
        bare = value in ("true", "false", "null", "none", "[]") or re.fullmatch(r"[-+.\deE]+", value)
        return f"{end if ends[end] == 1 else key}={value}" if bare or "." in key else value

    return " + ".join(in_short(key, value) for key, value in choices.items())
