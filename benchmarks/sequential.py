"""Several looks at a sweep, simulated: false verdicts with and without the spending rule, power, and seeds spent.

python benchmarks/sequential.py                  some minutes on one core
python benchmarks/sequential.py --draws 2000     sooner, coarser

A draw is a sweep of arms and a baseline; every arm's differences share the baseline's noise. What is simulated is what
nai_xl.compare computes: the generalised p of each arm and metric at each look, Holm's adjustment, the level of the
look, verdicts that stand, arms that get no further seeds. p is vectorised, with fewer nodes, and checked against
Crossed.p.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from common import Row, command, write
from crossed_tables import Array, adjusted, spreads
from numpy.typing import NDArray

from nai_xl.compare.statistics.crossed import LEVEL, Crossed, crossed
from nai_xl.compare.statistics.paired import holm
from nai_xl.compare.statistics.spending import LEAST_SEEDS, Plan

Flags = NDArray[np.bool_]

ITEMS = 12
PLANS = {"1 look": (), "3 looks": (3, 6), "5 looks": (3, 5, 7, 9), "8 looks": tuple(range(3, 10))}
SEEDS = 10
NODES = (40, 30.0), (10, 10.0)
CHUNK = 400  # sweeps drawn at a time
FAR = 1.5  # standard errors, below which p is above 0.1


def check() -> float:
    """The largest relative difference from Crossed.p, of p from 1e-5 to LEVEL. Holm's must be paired.holm's."""
    random, worst = np.random.default_rng(1), 0.0
    for seeds in (3, 5, 10):
        for of_items in (0.3, 3.0):
            tables = draw_noise(random, "normal", 40, 1, 1, seeds, of_items)[:, 0, 0]
            means = tables.mean((1, 2)) * np.tile([1.0, 2.0, 4.0, 8.0], 10)
            fast = spreads(tables).p(means, NODES, FAR)
            right = np.array([crossed(table).p(mean) for table, mean in zip(tables, means, strict=True)])
            worst = max(worst, float(np.abs(fast / right - 1)[(right > 1e-5) & (right < LEVEL)].max()))
    p = random.random((20, 8)) ** 3
    for row, found in zip(p, adjusted(p, 4), strict=True):
        assert np.allclose(holm(list(row), possible=4), found)
    plain = spreads(random.normal(size=(1, 5, 1)))
    assert np.isclose(plain.p(np.array([1.0]), NODES)[0], Crossed(5, 1, float(plain.of_seeds[0])).p(1.0))
    return worst


# --- sweeps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A sweep with one effect for each arm, in standard deviations of a seed's difference, on all of its metrics.

    items: the standard deviation of the items' part of a difference, in units of the seeds' part; None for a metric
    without items. margin: below it a difference is none; None for metrics without a margin.
    """

    name: str
    effects: Sequence[float] = (0.0,) * 5
    metrics: int = 3
    noise: str = "normal"
    items: float | None = None
    margin: float | None = None
    seeds: int = SEEDS


@dataclass(frozen=True)
class Claims:
    """p [looks, draws, arms, metrics] after LEAST_SEEDS, ... seeds: that arms differ, and that they are equal."""

    different: Array
    equal: Array | None
    positive: Flags


def draw_noise(
    random: np.random.Generator, noise: str, draws: int, arms: int, metrics: int, seeds: int, of_items: float | None
) -> Array:
    """[draws, arms, metrics, seeds, items]: differences from one baseline, of which the seeds' part has deviation 1."""

    def values(*shape: int) -> Array:
        drawn = random.standard_t(3, shape) / 3**0.5 if noise == "t3" else random.standard_normal(shape)
        return np.asarray((drawn[:, 1:] - drawn[:, :1]) / 2**0.5)

    found = values(draws, arms + 1, metrics, seeds, 1)
    if of_items is None:
        return found
    of_items_alone = of_items * values(draws, arms + 1, metrics, 1, ITEMS)
    return np.asarray(found + of_items_alone + values(draws, arms + 1, metrics, seeds, ITEMS))


def claims(case: Case, draws: int, seed: int = 0) -> Claims:
    """What is found at every number of seeds, in so many sweeps."""
    random = np.random.default_rng(seed)
    parts = [_claims(case, min(CHUNK, draws - start), random) for start in range(0, draws, CHUNK)]
    equal = [part.equal for part in parts if part.equal is not None]
    return Claims(
        np.concatenate([part.different for part in parts], 1),
        np.concatenate(equal, 1) if equal else None,
        np.concatenate([part.positive for part in parts], 1),
    )


def _claims(case: Case, draws: int, random: np.random.Generator) -> Claims:
    tables = draw_noise(random, case.noise, draws, len(case.effects), case.metrics, case.seeds, case.items)
    tables = tables + np.array(case.effects)[:, None, None, None]
    different, equal, positive = [], [], []
    for seeds in range(LEAST_SEEDS, case.seeds + 1):
        seen = tables[..., :seeds, :]
        spread, means = spreads(seen), seen.mean((-2, -1))
        different.append(spread.p(means, NODES, FAR))
        positive.append(means > 0)
        if case.margin is not None:
            inside = case.margin - np.abs(means)
            equal.append(np.where(inside > 0, spread.p(inside, NODES, FAR) / 2, 1.0))
    return Claims(np.stack(different), np.stack(equal) if equal else None, np.stack(positive))


@dataclass(frozen=True)
class Outcome:
    """Of each draw, arm and metric: what was ever decided, and at the end; of each draw and arm, its seeds."""

    ever_different: Flags
    ever_equal: Flags
    different: Flags
    equal: Flags
    seeds: NDArray[np.int64]


def follow(
    found: Claims, case: Case, looks: Sequence[int], *, rule: bool = True, until: bool = False, prune: bool = False
) -> Outcome:
    """Look after `looks` and after all seeds, at the levels of the `rule` or at 5 % each.

    until: arms of which all metrics are decided get no further seeds. prune: nor do arms with a metric that is higher,
    and none that is lower.
    """
    plan = Plan.of(case.seeds, looks)
    _, draws, arms, metrics = found.different.shape
    shape = (draws, arms, metrics)
    p_different, p_equal = np.ones(shape), np.ones(shape)
    positive, different, equal = (np.zeros(shape, bool) for _ in range(3))
    ever_different, ever_equal = np.zeros(shape, bool), np.zeros(shape, bool)
    open_, seeds = np.ones((draws, arms), bool), np.zeros((draws, arms), np.int64)
    for look, level in plan.levels.items():
        times, at = LEVEL / level if rule else 1.0, look - LEAST_SEEDS
        p_different = np.where(open_[..., None], found.different[at] * times, p_different)
        positive = np.where(open_[..., None], found.positive[at], positive)
        seeds = np.where(open_, look, seeds)
        tested = [p_different.reshape(draws, -1)]
        if found.equal is not None:
            p_equal = np.where(open_[..., None], found.equal[at] * times, p_equal)
            tested.append(p_equal.reshape(draws, -1))
        holms = adjusted(np.concatenate(tested, 1), arms * metrics)
        now_equal = holms[:, arms * metrics :].reshape(shape) < LEVEL if found.equal is not None else ever_equal & False
        now_different = (holms[:, : arms * metrics].reshape(shape) < LEVEL) & ~now_equal
        different = now_different | (different & ~now_equal)
        equal = now_equal | (equal & ~now_different)
        ever_different, ever_equal = ever_different | now_different, ever_equal | now_equal
        if until:
            open_ = open_ & ~(different | equal).all(-1)
        if prune:
            open_ = open_ & ~((different & positive).any(-1) & ~(different & ~positive).any(-1))
    return Outcome(ever_different, ever_equal, different, equal, seeds)


def wrong(outcome: Outcome, case: Case) -> float:
    """The share of sweeps with any false verdict at any look."""
    effects = np.abs(np.array(case.effects))[:, None]
    false = outcome.ever_different & (effects == 0)
    if case.margin is not None:
        false |= outcome.ever_equal & (effects >= case.margin)
    return float(false.any((1, 2)).mean())


# --- tables -----------------------------------------------------------------------------------------------------------


def error_rows(draws: int) -> Iterator[Row]:
    """Family error in %, by number of looks."""
    null = Case("one arm, one metric, no items", (0.0,), 1)
    five = Case("5 arms x 3 metrics, no items")
    slow = max(draws // 2, 1)  # items take longer
    for case, count in (
        (null, draws),
        (five, draws),
        (replace(five, name=f"{five.name}, t3", noise="t3"), draws),
        (replace(five, name="5 arms x 3 metrics, no items, all exactly at the margin of 2 sd", margin=2.0,
                 effects=(2.0, -2.0, 2.0, -2.0, 2.0)), draws),
        (replace(five, name=f"5 arms x 3 metrics, {ITEMS} items, seeds dominate", items=0.3), slow),
        (replace(five, name=f"5 arms x 3 metrics, {ITEMS} items that dominate", items=3.0), slow),
        (replace(five, name=f"5 arms x 3 metrics, {ITEMS} items that dominate, t3", items=3.0, noise="t3"), slow),
    ):  # fmt: skip
        found = claims(case, count)
        for rule in (True, False):
            errors = {name: 100 * wrong(follow(found, case, looks, rule=rule), case) for name, looks in PLANS.items()}
            stops = follow(found, case, PLANS["8 looks"], rule=rule, until=True, prune=True)
            cells = {name: f"{value:.1f}" for name, value in errors.items()}
            cells["8 looks, stopping"] = f"{100 * wrong(stops, case):.1f}"
            levels = "shared" if rule else "5 % at each look"
            yield {"false verdicts, % of sweeps": case.name, "levels": levels, **cells, "draws": count}


def power_rows(draws: int) -> Iterator[Row]:
    """The chance in % that one arm's metric is found to differ by the end, the other four arms without an effect."""
    for effect in (1.0, 1.5, 2.0, 3.0):
        case = Case("", (effect, 0.0, 0.0, 0.0, 0.0))
        found = claims(case, draws)
        row: Row = {"effect, sd": effect}
        for name, looks in PLANS.items():
            row[name] = f"{100 * float(follow(found, case, looks).different[:, 0, 0].mean()):.0f}"
        first = replace(case, seeds=5)
        for name, looks in (("5 seeds, 1 look", ()), ("5 seeds, looks at 3 and 5", (3,))):
            row[name] = f"{100 * float(follow(found, first, looks).different[:, 0, 0].mean()):.0f}"
        yield row


def seeds_rows(draws: int) -> Iterator[Row]:
    """Seeds that arms get on the average, of SEEDS, and how many of their metrics are decided."""
    effects = (0.0, 1.0, 2.0, 4.0)
    whole = [Case("5 arms x 3 metrics", (0.0, *effects))]
    alone = [Case("one arm, one metric", (effect,), 1) for effect in effects]
    for cases, margin in itertools.product((whole, alone), (None, 2.0, 4.0)):
        swept = [replace(case, margin=margin) for case in cases]
        found = [claims(case, draws) for case in swept]
        for name, looks, until, prune in (
            ("seeds_until=decided", PLANS["8 looks"], True, False),
            ("seeds_until=decided, looks=[3,6]", PLANS["3 looks"], True, False),
            ("prune=true, looks=[3,6]", PLANS["3 looks"], False, True),
        ):
            row: Row = {"sweep": cases[0].name, "margin, sd": margin or "none", "settings": name}
            outcomes = [follow(*one, looks, until=until, prune=prune) for one in zip(found, swept, strict=True)]
            for case, outcome in zip(swept, outcomes, strict=True):
                decided = 100 * (outcome.different | outcome.equal).mean((0, 2))
                for effect, seeds, share in zip(case.effects, outcome.seeds.mean(0), decided, strict=True):
                    row[f"effect {effect:.0f} sd: seeds (decided)"] = f"{seeds:.1f} ({share:.0f} %)"
            row["false, % at most"] = f"{100 * max(map(wrong, outcomes, swept)):.1f}"
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000, help="simulated sweeps of a row; half of it with items")
    parser.add_argument("--name", default="sequential", help="with which the names of the files in results/ begin")
    args = parser.parse_args()
    settings = {
        "seeds": SEEDS, "arms": 5, "metrics": 3, "draws": args.draws,
        "looks": "; ".join(f"{name}: {' '.join(map(str, [*looks, SEEDS]))}" for name, looks in PLANS.items()),
        "p differs from Crossed.p by at most": f"{100 * check():.1f} % of p",
    }  # fmt: skip
    for name, rows in (("errors", error_rows), ("power", power_rows), ("seeds", seeds_rows)):
        write(f"{args.name}_{name}", command(), settings, list(rows(args.draws)))


if __name__ == "__main__":
    main()
