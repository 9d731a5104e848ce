"""Several looks at one sweep: the levels they have, what is recorded, and how often they are wrong together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from nai_xl.compare.arms import ArmRuns
from nai_xl.compare.comparison import Comparison, Question, compare
from nai_xl.compare.judging.looks import chance, judged_at_look
from nai_xl.compare.judging.rows import Row, judged
from nai_xl.compare.runs.run import Run
from nai_xl.compare.statistics.crossed import LEVEL
from nai_xl.compare.statistics.paired import Effect
from nai_xl.compare.statistics.spending import Plan, plan_of, spent
from nai_xl.record.looks import Look

# --- what a look may take ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.3, 0.5, 0.6, 0.8, 1.0])
def test_the_spending_function_is_that_of_lan_and_demets(share: float) -> None:
    """2 - 2 Phi(x) = erfc(x / sqrt 2), with the textbook's z = 1.959964."""
    assert spent(share) == pytest.approx(math.erfc(1.959963984540054 / math.sqrt(2 * share)), rel=1e-9)


def test_the_spending_function_begins_at_nothing_and_ends_at_five_per_cent() -> None:
    assert spent(0) == 0 and spent(1) == pytest.approx(0.05) == spent(1.5)
    assert [round(spent(look / 5), 4) for look in (3, 4, 5)] == [0.0114, 0.0284, 0.05]


@given(st.integers(3, 200), st.sets(st.integers(1, 250)))
def test_the_levels_of_planned_looks_add_up_to_five_per_cent(seeds: int, looks: set[int]) -> None:
    plan = Plan.of(seeds, looks)
    assert plan.looks[-1] == seeds and set(plan.looks[:-1]) == {look for look in looks if 3 <= look < seeds}
    assert sum(plan.levels.values()) == pytest.approx(LEVEL) and min(plan.levels.values()) > 0


def test_the_settings_of_a_sweep_are_its_plan() -> None:
    assert plan_of({}) is None and plan_of({"seeds": None, "looks": [3]}) is None
    assert plan_of({"seeds": 5}) == Plan(5, (5,)) and Plan(5, (5,)).levels == {5: pytest.approx(LEVEL)}
    assert plan_of({"seeds": 5, "looks": [3, 9]}) == Plan(5, (3, 5))
    assert plan_of({"seeds": 5, "prune": True}) == Plan(5, (3, 5))
    until = {"seeds": 3, "seeds_until": "decided", "max_seeds": 6}
    assert plan_of({**until, "max_seeds": 10}) == Plan(10, (3, 6, 10))
    assert plan_of(until) == Plan(6, (3, 6)) and plan_of({**until, "looks": [4]}) == Plan(6, (4, 6))


# --- looks at runs ----------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(3).normal(0, 0.1, (3, 10))


def runs(seeds: Mapping[str, int], effects: Mapping[str, float], status: str = "FINISHED") -> list[Run]:
    """The arms a, b ... with so many seeds each, and effects on the logarithm of val/loss."""
    return [
        Run(f"{arm}-{seed}", {"loss": arm}, seed, status,
            curves={"val/loss": {800: float(np.exp(effects.get(arm, 0.0) + NOISE[number, seed]))}})
        for number, (arm, count) in enumerate(seeds.items())
        for seed in range(count)
    ]  # fmt: skip


def look_at(found: Sequence[Run], plan: Plan | None, earlier: Sequence[Look]) -> Comparison:
    return compare(found, Question("x", baseline="loss=a", plan=plan), looks=earlier)


def test_planned_looks_share_the_five_per_cent_and_the_same_data_are_one_look() -> None:
    plan = Plan.of(5, [3])
    first = look_at(runs({"a": 3, "b": 3}, {"b": 1.0}), plan, [])
    (look,) = first.looks
    seen = look.arms["loss=b"]
    assert (seen.seeds, seen.step, seen.planned) == ((0, 1, 2), 800, True) and len(look.arms) == 1
    assert seen.level == pytest.approx(0.011396, rel=1e-4)
    assert (look.seeds, look.looks, look.metrics, look.baseline) == (5, (3, 5), ("val/loss",), "loss=a")
    one, alone = first.rows[0], compare(runs({"a": 3, "b": 3}, {"b": 1.0}), Question("x", baseline="loss=a")).rows[0]
    assert one.effect and one.effect.p and one.effect == alone.effect and alone.p_holm == one.effect.p
    assert one.p_holm == pytest.approx(one.effect.p * 0.05 / 0.011396, rel=1e-4)
    assert "planned looks share the 5 %: 1.1 % at 3 seeds, 3.9 % at 5 seeds; p is adjusted for that too" in first.notes
    again = look_at(runs({"a": 3, "b": 3}, {"b": 1.0}), plan, first.looks)
    assert again.looks == first.looks and again.rows == first.rows
    last = look_at(runs({"a": 5, "b": 5}, {"b": 1.0}), plan, first.looks)
    assert [seen.arms["loss=b"].planned for seen in last.looks] == [True, True]
    assert chance(last.looks) == pytest.approx(LEVEL) and not any("so far" in note for note in last.notes)


def test_a_sweep_without_planned_looks_is_judged_once_at_five_per_cent() -> None:
    found = look_at(runs({"a": 5, "b": 5}, {}), Plan.of(5), [])
    alone = compare(runs({"a": 5, "b": 5}, {}), Question("x", baseline="loss=a"))
    assert found.rows == alone.rows and found.notes == alone.notes
    assert found.looks[0].arms["loss=b"].level == pytest.approx(LEVEL)


def test_unplanned_looks_are_counted_and_said() -> None:
    peek = look_at(runs({"a": 5, "b": 4}, {}), Plan.of(5), [])
    assert "not a planned look, which is at 5 seeds, all finished: b with 4" in peek.notes
    last = look_at(runs({"a": 5, "b": 5}, {}), Plan.of(5), peek.looks)
    assert (
        "2 looks at this sweep so far, 1 of them not planned: the chance of a false verdict in any is up to 7.8 %, "
        "not 5 %"
    ) in last.notes
    running = look_at(runs({"a": 5, "b": 5}, {}, status="RUNNING"), Plan.of(5), [])
    assert not running.looks[0].arms["loss=b"].planned
    assert look_at(runs({"a": 5, "b": 2}, {}), Plan.of(5), []).looks == []  # two seeds are not judged


def test_seeds_added_after_a_look_are_not_planned() -> None:
    """The sweep of three seeds was undecided, so somebody typed run.seed=0,1,2,3,4."""
    for before, after in ((Plan.of(3), Plan.of(5)), (None, None)):
        first = look_at(runs({"a": 3, "b": 3}, {}), before, [])
        assert first.looks[0].arms["loss=b"].planned
        second = look_at(runs({"a": 5, "b": 5}, {}), after, first.looks)
        assert not second.looks[1].arms["loss=b"].planned and chance(second.looks) == pytest.approx(0.1)


def test_seeds_may_come_from_several_commands() -> None:
    """run.seed=0,1,2 on one machine and run.seed=3,4 on another: the newest run knows of two planned seeds."""
    found = look_at(runs({"a": 5, "b": 5}, {}), Plan.of(2), [])
    assert found.looks[0].plan == (5, (5,)) and found.looks[0].arms["loss=b"].planned
    assert found.notes == ["compared by the ratio of positive errors: val/loss"]  # and nothing about looks


def test_looks_at_other_arms_metrics_or_baselines_are_further_chances_of_error() -> None:
    plan = Plan.of(3)
    first = look_at(runs({"a": 3, "b": 3}, {}), plan, [])
    assert chance(first.looks) == pytest.approx(LEVEL)
    second = look_at(runs({"a": 3, "b": 3, "c": 3}, {}), plan, first.looks)
    assert chance(second.looks) == pytest.approx(0.1) and any("not all at the same arms" in n for n in second.notes)
    other = compare(runs({"a": 3, "b": 3}, {}), Question("x", baseline="loss=b", plan=plan), looks=first.looks)
    assert chance(other.looks) == pytest.approx(0.1)


def test_what_a_planned_look_has_decided_stands() -> None:
    plan = Plan.of(10, [9])  # the last look has 1.1 % only
    strong = runs({"a": 9, "b": 9}, {"b": 0.15})
    first = look_at(strong, plan, [])
    assert first.rows[0].verdict == "worse"
    late = [replace(run, curves={"val/loss": {800: 0.5}}) if run.seed == 9 else run for run in runs({"a": 10}, {})]
    late += [replace(run, curves={"val/loss": {800: 0.2}}) if run.seed == 9 else run for run in
             runs({"-": 0, "b": 10}, {"b": 0.15})]  # fmt: skip
    second = look_at(late, plan, first.looks)
    assert second.rows[0].verdict == "worse" and second.rows[0].p_holm and second.rows[0].p_holm > 0.05
    assert any("decided by the planned look at 9 seeds" in note for note in second.rows[0].notes)
    assert look_at(late, plan, []).rows[0].verdict == "undecided"


# --- how often they are wrong -----------------------------------------------------------------------------------------

ARMS, METRICS, SWEEPS = 5, 3, 400


def null_rows(tables: np.ndarray, seeds: int) -> list[Row]:
    """Rows of differences [arms, metrics, seeds] after so many seeds."""
    seen = tables[..., :seeds]
    means, errors = seen.mean(-1), seen.std(-1, ddof=1) / seeds**0.5
    p = 2 * special.stdtr(seeds - 1, -np.abs(means / errors))
    return [
        Row(f"mine/{metric}", f"loss={arm}", "", 1.0, 1.0, seeds=range(seeds), step=1,
            effect=Effect(float(means[arm, metric]), -1.0, 1.0, float(p[arm, metric]), None, None, None, seeds, 1,
                          float(means[arm, metric]), None))
        for metric in range(METRICS)
        for arm in range(ARMS)
    ]  # fmt: skip


def test_repeated_looks_at_nothing_are_seldom_wrong_with_the_rule_and_often_without() -> None:
    random, plan = np.random.default_rng(0), Plan.of(8, [3, 4, 5, 6, 7])
    judge = partial(judged, directions={}, margins={})
    finished = {seed: Run(f"x-{seed}", {}, seed) for seed in range(8)}
    arms = [ArmRuns(name, {}, finished) for name in ("base", *(f"loss={arm}" for arm in range(ARMS)))]
    wrong = {"rule": 0, "naive": 0}
    for _ in range(SWEEPS):
        noise = random.standard_normal((ARMS + 1, METRICS, 8))
        tables = noise[1:] - noise[0]
        looks: list[Look] = []
        naive = False
        for seeds in plan.looks:
            rows = null_rows(tables, seeds)
            _, looks = judged_at_look(rows, arms, plan, looks, judge)
            naive = naive or any(row.verdict != "undecided" for row in judge(rows))
        assert len(looks) == 6 and chance(looks) == pytest.approx(LEVEL)
        wrong["rule"] += any(look.verdicts for look in looks)
        wrong["naive"] += naive
    assert wrong["rule"] / SWEEPS < LEVEL + 2 * (LEVEL * (1 - LEVEL) / SWEEPS) ** 0.5
    assert wrong["naive"] / SWEEPS > 0.12


def test_runs_that_were_measured_anew_are_looked_at_anew() -> None:
    """The same seeds and steps, other numbers: python -m nai_xl.evaluate measures finished runs again."""
    plan, three = Plan.of(5, [3]), {"a": 3, "b": 3}
    first = look_at(runs(three, {"b": 1.0}), plan, [])
    again = look_at(runs(three, {"b": 1.0}), plan, first.looks)
    anew = look_at(runs(three, {"b": 1.1}), plan, first.looks)
    assert len(again.looks) == 1 and len(anew.looks) == 2
    assert not anew.looks[-1].arms["loss=b"].planned
