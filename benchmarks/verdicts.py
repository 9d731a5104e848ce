"""How often the verdicts of `compare` are wrong: simulated sweeps, the statistic of 0.1 beside today's.

Three tables. `intervals`: coverage of the 95 % interval and the share of p below 0.001 where nothing differs, and the
power where something does. `family`: sweeps of five arms and three metrics in which nothing differs, and the share of
them with any false verdict. `equal`: how often arms are called equal that are at the margin, or are the same.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from common import RESULTS, Row, command, write
from crossed_tables import Array, Spreads, adjusted, spreads
from scipy import stats

Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
NODES = (28, 24.0), (16, 14.0)


# --- the two statistics, for many tables at once ----------------------------------------------------------------------


def p_of_0_1(found: Spreads, difference: Array) -> Array:
    """Student's t with Satterthwaite's degrees of freedom."""
    variance = found.of_seeds + found.more_by_items
    with np.errstate(divide="ignore", invalid="ignore"):
        of_seeds, of_items = ((part / variance) ** 2 for part in (found.of_seeds, found.more_by_items))
        df = 1 / (of_seeds / (found.seeds - 1) + of_items / max(1, found.items - 1))
        p = 2 * stats.t.sf(np.abs(difference) / np.sqrt(variance), df)
    return np.where(difference == 0, 1.0, np.where(variance > 0, p, 0.0))


def p_of_today(found: Spreads, difference: Array) -> Array:
    return found.p(difference, NODES)


STATISTICS: Mapping[str, Callable[[Spreads, Array], Array]] = {"0.1": p_of_0_1, "today": p_of_today}


# --- what is simulated ------------------------------------------------------------------------------------------------


def t3(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return random.standard_t(3, shape) / np.sqrt(3)


def mixture(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """One in ten is five times as far from the mean, as a run that nearly diverged."""
    return random.standard_normal(shape) * np.where(random.random(shape) < 0.1, 5, 1)


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return random.standard_normal(shape)


SPREADS = {  # standard deviations that seeds, items and both together add to a paired difference
    "alike": (1, 1, 1), "seeds": (3, 0.3, 1), "items": (0.3, 3, 1), "neither": (0.1, 0.1, 1),
}  # fmt: skip


def differences(draw: Draw, spread: Sequence[float], draws: int, seeds: int, items: int) -> Array:
    """[N, S, I] of mean 0."""
    random = np.random.default_rng([seeds, items])
    of_seeds, of_items, of_both = spread
    tables = of_seeds * draw(random, (draws, seeds, 1)) + of_both * draw(random, (draws, seeds, items))
    return tables + of_items * draw(random, (draws, 1, items)) if items > 1 else tables


def errors(spread: Sequence[float], draws: int, seeds: int, items: int) -> tuple[Array, Array]:
    """Two arms' positive errors [N, S, I], skewed as exp(0.5 normal) is, of which the second is 10 % smaller."""
    random = np.random.default_rng([seeds, items])
    of_seeds, of_items, of_both = (0.1 * s for s in spread)
    shared = 0.5 * random.standard_normal((draws, seeds, 1)) + 0.5 * random.standard_normal((draws, 1, items))
    own = differences(normal, (of_seeds, of_items, of_both), draws, seeds, items)
    return np.exp(shared), 0.9 * np.exp(shared + own)


def counts(draws: int, seeds: int, of: int) -> tuple[Array, Array]:
    """Two arms' shares of `of` things that are right with a chance of 3/4, one value a seed."""
    random = np.random.default_rng([seeds, of])
    return tuple(random.binomial(of, 0.75, (draws, seeds, 1)) / of for _ in range(2))  # type: ignore[return-value]


# --- tables -----------------------------------------------------------------------------------------------------------


def judged(p: Array, prefix: str) -> Row:
    return {f"coverage {prefix}": float((p >= 0.05).mean()), f"p < 0.001 {prefix}": float((p < 0.001).mean())}


def intervals(draws: int) -> Iterator[Row]:
    for (name, draw), (spread, sds), seeds, items in itertools.product(
        {"normal": normal, "t3": t3, "mixture": mixture}.items(), SPREADS.items(), (3, 5, 12), (1, 4, 16, 64)
    ):
        if items == 1 and spread != "alike":
            continue
        tables = differences(draw, sds, draws, seeds, items)
        found = spreads(tables)
        row: Row = {"values": name, "spread by": spread if items > 1 else "", "seeds": seeds, "items": items}
        for prefix, statistic in STATISTICS.items():
            row |= judged(statistic(found, found.mean), prefix)
        effect = 3 * float(tables.mean((1, 2)).std())
        for prefix, statistic in STATISTICS.items():
            row[f"power {prefix}"] = float((statistic(found, found.mean + effect) < 0.05).mean())
        yield row
    yield from _of_errors(draws)
    yield from _of_counts(draws)


def _of_errors(draws: int) -> Iterator[Row]:
    """0.1 compared the differences of errors, today their ratios are compared."""
    for (spread, sds), seeds, items in itertools.product(SPREADS.items(), (3, 5, 12), (1, 4, 16, 64)):
        if items == 1 and spread != "alike":
            continue
        baseline, arm = errors(sds, draws, seeds, items)
        plain, ratios = spreads(arm - baseline), spreads(np.log(arm / baseline))
        true, ratio = float((arm - baseline).mean()), float(np.log(0.9))
        row: Row = {"values": "errors", "spread by": spread if items > 1 else "", "seeds": seeds, "items": items}
        row |= judged(p_of_0_1(plain, plain.mean - true), "0.1")
        row |= judged(p_of_today(ratios, ratios.mean - ratio), "today")
        row["power 0.1"] = float((p_of_0_1(plain, plain.mean) < 0.05).mean())
        row["power today"] = float((p_of_today(ratios, ratios.mean) < 0.05).mean())
        yield row


def _of_counts(draws: int) -> Iterator[Row]:
    for seeds, of in itertools.product((2, 3, 5, 12), (8, 24)):
        first, second = counts(draws, seeds, of)
        found, stepped = spreads(second - first), spreads(second - first, step=1 / of)
        row: Row = {"values": f"shares of {of}", "seeds": seeds, "items": 1}
        row |= judged(p_of_0_1(found, found.mean), "0.1")
        yield row | judged(p_of_today(stepped, stepped.mean), "today")


def family(
    draws: int, seeds: Sequence[int] = (2, 3, 5, 12), arms: int = 5, metrics: int = 3, items: int = 40
) -> Iterator[Row]:
    """All arms are compared with one baseline, so that their differences share its noise."""
    for many, (spread, sds) in itertools.product(seeds, SPREADS.items()):
        p: dict[str, list[Array]] = {name: [] for name in STATISTICS}
        for metric in range(metrics):
            random = np.random.default_rng([many, metric])
            sides = [
                sum(
                    s * random.standard_normal(shape)
                    for s, shape in zip(sds, ((draws, many, 1), (draws, 1, items), (draws, many, items)), strict=True)
                )
                for _ in range(arms)
            ]
            for side in sides[1:]:
                found = spreads(np.asarray(side - sides[0]))
                for name, statistic in STATISTICS.items():
                    p[name].append(statistic(found, found.mean))
        row: Row = {"seeds": many, "spread by": spread}
        for name, each in p.items():
            row[f"any false verdict {name}"] = float((adjusted(np.array(each).T, len(each)) < 0.05).any(1).mean())
        yield row


def equal(draws: int) -> Iterator[Row]:
    """The margin is a number of standard deviations of the mean difference."""
    for seeds, items, (spread, sds) in itertools.product((3, 5, 12), (1, 16, 64), SPREADS.items()):
        if items == 1 and spread != "alike":
            continue
        found = spreads(differences(normal, sds, draws, seeds, items))
        deviation = float(found.mean.std())
        for margin in (3, 6):
            inside = [margin * deviation - np.abs(found.mean + true) for true in (margin * deviation, 0.0)]
            called = [(p_of_today(found, room) / 2 < 0.05) & (room > 0) for room in inside]
            yield {
                "seeds": seeds, "items": items, "spread by": spread if items > 1 else "", "margin / sd": margin,
                "called equal at the margin": float(called[0].mean()),
                "called equal when equal": float(called[1].mean()),
            }  # fmt: skip


TABLES = {"intervals": intervals, "family": family, "equal": equal}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20_000, help="simulated comparisons of a row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    for name, table in TABLES.items():
        write(f"verdicts_{name}", command(), {"draws a row": args.draws}, list(table(args.draws)), args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
