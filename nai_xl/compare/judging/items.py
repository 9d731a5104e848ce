"""The tables of a metric that is a mean over items: runs x items, the items paired by their names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from nai_xl.compare.runs.run import Run
from nai_xl.compare.statistics.crossed import Array

NOISE_OF_PROMPT = re.compile(r"/\d+$")  # evals.prompted names its items <prompt>/<number of the noise>


@dataclass(frozen=True)
class ItemTables:
    """Both sides' values [S, I], and how many items were left out because a run lacks them."""

    arm: Array
    baseline: Array
    missing: int


def item_tables(metric: str, pairs: Sequence[tuple[Run, Run]], step: int) -> ItemTables | None:
    """The table of the items that all runs share; None if the metric is not the mean of its items.

    Samples of one prompt with several noises are one item, their mean: another prompt is another question to the model,
    another noise is not.
    """
    rows = [[run.items(metric).get(step, {}) for run in pair] for pair in pairs]
    for pair, values in zip(pairs, rows, strict=True):
        for run, row in zip(pair, values, strict=True):
            if not row or not math.isclose(fmean(row.values()), run.curves[metric][step], rel_tol=1e-3, abs_tol=1e-9):
                return None
    names = [set(row) for pair in rows for row in pair]
    shared, every = sorted(set.intersection(*names)), set.union(*names)
    prompts = [[_by_prompt({item: row[item] for item in shared}) for row in pair] for pair in rows]
    items = list(prompts[0][0])
    if len(items) < 2:
        return None
    first, second = (np.array([[pair[side][item] for item in items] for pair in prompts]) for side in (0, 1))
    return ItemTables(first, second, len(every) - len(shared))


def unlike_items(metric: str, pairs: Sequence[tuple[Run, Run]], step: int) -> tuple[int, str]:
    """Of a metric without item_tables: how many items there are although no two are in every run, and a remark where
    only some runs have items.
    """
    rows = [run.items(metric).get(step, {}) for pair in pairs for run in pair]
    known = [set(row) for row in rows if row]
    if 0 < len(known) < len(rows):
        return 0, "some runs have no single items, so that seeds alone are paired"
    every = set.union(*known) if known else set()
    return (len(every), "") if len(every) > 1 and len(set.intersection(*known)) < 2 else (0, "")


def _by_prompt(row: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for item, value in row.items():
        found.setdefault(NOISE_OF_PROMPT.sub("", item), []).append(value)
    return {prompt: fmean(values) for prompt, values in found.items()}
