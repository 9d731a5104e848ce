"""Several looks at one sweep: which are planned, what each may decide, and what all of them do to the chance of error.

Every arm has its own looks, since arms of an unfinished sweep have unlike numbers of seeds. Its p-values are multiplied
by 5 % / its level before Holm's adjustment over all arms and metrics. A false verdict then needs one of the n true
claims to have a p below its level / n at one of its looks, so that its chance is at most the mean over these claims of
the sum of their levels: 5 % if all looks are planned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from nai_xl.compare.arms import ArmRuns
from nai_xl.compare.judging.rows import Row
from nai_xl.compare.judging.verdicts import UNDECIDED
from nai_xl.compare.statistics.crossed import LEVEL
from nai_xl.compare.statistics.spending import Plan
from nai_xl.record.looks import ArmLook, Look

Judge = Callable[[Sequence[Row]], list[Row]]


def judged_at_look(
    rows: Sequence[Row], arms: Sequence[ArmRuns], plan: Plan | None, earlier: Sequence[Look], judge: Judge
) -> tuple[list[Row], list[Look]]:
    """Rows with verdicts at the level that this look may take, and all looks with this one as the last.

    arms: the baseline first. Without a `plan`, or where more seeds are there than it has, those are taken for the
    planned ones. What a planned look has decided stands, even if later ones leave it undecided.
    """
    there = max(len({*arm.runs, *(run.seed for run in arm.failed)}) for arm in arms)
    if plan is None or plan.seeds < there:
        plan = Plan.of(there, plan.looks if plan else ())
    look = _look(rows, arms, plan, earlier)
    levelled = [replace(row, level=look.arms[row.arm].level) if row.arm in look.arms else row for row in rows]
    found = [_standing(row, look, earlier) for row in judge(levelled)]
    if not look.arms:
        return found, list(earlier)
    decided: dict[str, dict[str, str]] = {}
    for row in found:
        if row.tested and row.verdict != UNDECIDED:
            decided.setdefault(row.metric, {})[row.arm] = row.verdict
    look = replace(look, verdicts=decided)
    before = [other for other in earlier if not other.same_data(look)]
    return found, [*before, next((other for other in earlier if other.same_data(look)), look)]


def _look(rows: Sequence[Row], arms: Sequence[ArmRuns], plan: Plan, earlier: Sequence[Look]) -> Look:
    baseline, metrics = arms[0], tuple(dict.fromkeys(row.metric for row in rows))
    seen = {}
    for arm in arms[1:]:
        if tested := [row for row in rows if row.arm == arm.label and row.tested]:
            seen[arm.label] = _arm_look(tested, arm, baseline, plan, earlier)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Look(now, baseline.label, metrics, plan.seeds, plan.looks, seen)


def _arm_look(rows: Sequence[Row], arm: ArmRuns, baseline: ArmRuns, plan: Plan, earlier: Sequence[Look]) -> ArmLook:
    """As it was recorded, if these data were seen before. Otherwise it is planned where the plan has this number of
    seeds, was not changed after a look at this arm and did not have this look already, and all runs are finished.
    """
    seeds = tuple(sorted({seed for row in rows for seed in row.seeds}))
    step = max(row.step for row in rows if row.step is not None)
    look = ArmLook(seeds, step, planned=False, level=0.0, numbers=_numbers(rows))
    plan_kept, taken = True, False
    for other in earlier:
        if other.baseline == baseline.label and (before := other.arms.get(arm.label)) is not None:
            if before.same_data(look):
                return before
            plan_kept = plan_kept and other.plan == (plan.seeds, plan.looks)
            taken = taken or (before.planned and len(before.seeds) == len(seeds))
    finished = all(side.runs[seed].status == "FINISHED" for side in (arm, baseline) for seed in seeds)
    planned = finished and len(seeds) in plan.looks and plan_kept and not taken
    return replace(look, planned=planned, level=plan.level(min(len(seeds), plan.seeds), planned))


def _numbers(rows: Sequence[Row]) -> str:
    """Eight hex digits of the rows' means and items."""
    told = [
        (row.metric, f"{row.mean:.9g}", f"{row.baseline_mean:.9g}", row.effect and row.effect.items) for row in rows
    ]
    return hashlib.sha256(repr(sorted(told)).encode()).hexdigest()[:8]


def _standing(row: Row, look: Look, earlier: Sequence[Look]) -> Row:
    """A row that is undecided now has the verdict of the last planned look that decided it."""
    if row.verdict != UNDECIDED:
        return row
    for other in reversed(earlier):
        words = other.verdicts.get(row.metric, {}).get(row.arm)
        if words and (other.baseline, other.metrics) == (look.baseline, look.metrics) and other.arms[row.arm].planned:
            seeds = len(other.arms[row.arm].seeds)
            note = f"decided by the planned look at {seeds} seeds, although all seeds together would leave it undecided"
            return replace(row, verdict=words, seeds_needed=None, notes=[*row.notes, note])
    return row


def chance(looks: Sequence[Look]) -> float:
    """An upper bound on the chance of any false verdict in all of these looks together.

    Looks at other arms, at other metrics or with another baseline test other claims: the chances are added.
    """
    families = _families(looks)
    return min(1.0, sum(max(sum(levels.values()) for levels in arms.values()) for arms in families.values()))


def _families(looks: Sequence[Look]) -> dict[object, dict[str, dict[object, float]]]:
    """What is tested together -> arm -> the data that were seen of it -> their level."""
    found: dict[object, dict[str, dict[object, float]]] = {}
    for look in looks:
        arms = found.setdefault((look.baseline, look.metrics, frozenset(look.arms)), {})
        for arm, seen in look.arms.items():
            arms.setdefault(arm, {})[seen.seeds, seen.step] = seen.level
    return found


def told(looks: Sequence[Look], names: dict[str, str]) -> list[str]:
    """What a reader must know of the looks, the last of which is the present one; nothing of a single planned look."""
    if not looks:
        return []
    now = looks[-1]
    lines: list[str] = []
    shared = Plan(now.seeds, now.looks).levels
    if len(shared) > 1:
        parts = ", ".join(f"{_percent(level)} at {seeds} seeds" for seeds, level in shared.items())
        lines.append(f"planned looks share the {_percent(LEVEL)}: {parts}; p is adjusted for that too")
    if unplanned := [f"{names[arm]} with {len(seen.seeds)}" for arm, seen in now.arms.items() if not seen.planned]:
        planned = " or ".join(map(str, now.looks))
        lines.append(f"not a planned look, which is at {planned} seeds, all finished: {', '.join(unplanned)}")
    if (most := chance(looks)) > LEVEL * (1 + 1e-9):
        unlike = ", not all at the same arms and metrics" if len(_families(looks)) > 1 else ""
        count = sum(any(not seen.planned for seen in look.arms.values()) for look in looks)
        so_far = f"{len(looks)} look{'s' * (len(looks) > 1)} at this sweep so far, {count} of them not planned{unlike}"
        lines.append(f"{so_far}: the chance of a false verdict in any is up to {_percent(most)}, not {_percent(LEVEL)}")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
