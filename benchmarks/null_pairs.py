"""How often `compare` finds something between equal arms of real runs: pairs of arms resampled from one pool of seeds.

Trained runs of one config with many seeds are dealt out, five to each of two arms, so that nothing but chance differs.
It is the real noise of training and of the evaluators' items; benchmarks/verdicts.py simulates. The runs come from

    python -m nai_xl.train -m sweep.name=pool run.seed=0,1,2,3,4,5,6,7,8,9,10,11,12,13 ... output_dir=OUT
    python benchmarks/null_pairs.py OUT/tiny-*
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import RESULTS, Row, command, write

from nai_xl.compare.comparison import compare
from nai_xl.compare.question import Question
from nai_xl.compare.runs.directory import read_directory
from nai_xl.compare.runs.run import Run

FOUND = ("better", "worse", "higher", "lower")


def dealt(pool: Sequence[Run], seeds: int, random: np.random.Generator) -> list[Run]:
    """Two arms of `seeds` runs each, whose seeds are renumbered so that they pair."""
    chosen = random.choice(len(pool), 2 * seeds, replace=False)
    return [
        replace(pool[place], arm={"arm": "ab"[number >= seeds]}, seed=number % seeds)
        for number, place in enumerate(chosen)
    ]


def rows(pool: Sequence[Run], metrics: Sequence[str], pairs: int, seeds: int) -> list[Row]:
    random = np.random.default_rng(0)
    verdicts = {metric: Counter[str]() for metric in metrics}
    low = Counter[str]()
    families = 0
    for _ in range(pairs):
        found = compare(dealt(pool, seeds, random), Question("null", baseline="arm=a", metrics=metrics))
        for row in found.rows:
            verdicts[row.metric][row.verdict] += 1
            low[row.metric] += row.effect is not None and row.effect.p is not None and row.effect.p < 0.05
        families += any(row.verdict in FOUND for row in found.rows)
    lines: list[Row] = [
        {
            "metric": metric, "pairs": pairs, "p < 0.05": low[metric] / pairs,
            "false verdict": sum(verdicts[metric][word] for word in FOUND) / pairs,
            "equal": verdicts[metric]["equal"] / pairs, "undecided": verdicts[metric]["undecided"] / pairs,
        }
        for metric in metrics
    ]  # fmt: skip
    return [*lines, {"metric": "any of them", "pairs": pairs, "false verdict": families / pairs}]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs that differ in their seed alone")
    parser.add_argument("--metrics", nargs="+", default=["val/loss", "val/x0_loss", "color/error"])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5, help="of each arm")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    pool = [read_directory(path, {}) for path in args.runs]
    settings = {"runs": len(pool), "seeds of an arm": args.seeds}
    found = rows(pool, args.metrics, args.pairs, args.seeds)
    write("null_pairs", command(), settings, found, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
