"""The mean squares and p of nai_xl.compare for many tables at once: for simulations of many thousand draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from nai_xl.compare.statistics.crossed import chi_square_over_df

Array = NDArray[np.float64]
Nodes = tuple[tuple[int, float], tuple[int, float]]  # number and span, of seeds and of items: see crossed.py
CHUNK = 400  # differences whose p is taken at a time


@dataclass(frozen=True)
class Spreads:
    """crossed.Crossed for many tables at once: their means and mean squares, arrays of one shape."""

    seeds: int
    items: int
    mean: Array
    of_seeds: Array
    of_items: Array
    of_both: Array

    @property
    def more_by_items(self) -> Array:
        """What the items add to the variance of the mean."""
        return np.maximum(self.of_items - self.of_both, 0.0)

    def p(self, difference: Array, nodes: Nodes, far: float = 0.0) -> Array:
        """Crossed.p. Where there are items it is 1 in place of those nearer to 0 than `far` standard errors."""
        if self.items == 1:
            with np.errstate(divide="ignore", invalid="ignore"):
                t = np.abs(difference) / np.sqrt(self.of_seeds)
            return np.where(difference == 0, 1.0, 2 * special.stdtr(self.seeds - 1, -t))
        found = np.ones_like(difference)
        asked = (np.abs(difference) > far * np.sqrt(self.of_seeds + self.more_by_items)) & (difference != 0)
        for start in range(0, int(asked.sum()), CHUNK):
            some = tuple(index[start : start + CHUNK] for index in np.nonzero(asked))
            found[some] = self._crossed_p(some, np.abs(difference[some]), nodes)
        return found

    def _crossed_p(self, some: tuple[Any, ...], difference: Array, nodes: Nodes) -> Array:
        of_seeds, of_items, of_both = (v[some][:, None, None] for v in (self.of_seeds, self.of_items, self.of_both))
        u1, w1 = chi_square_over_df(self.seeds - 1, *nodes[0])
        u2, w2 = chi_square_over_df(self.items - 1, *nodes[1])
        u3, w3 = chi_square_over_df((self.seeds - 1) * (self.items - 1), *nodes[1])
        more = np.maximum(of_items / u2[:, None] - of_both / u3, 0.0).reshape(len(difference), 1, -1)
        variance = np.maximum(of_seeds / u1[:, None] + more, np.finfo(float).tiny)
        tails = special.ndtr(-difference[:, None, None] / np.sqrt(variance))
        return np.asarray(2 * np.einsum("dij,i,j->d", tails, w1, (w2[:, None] * w3).ravel()))


def spreads(tables: Array, step: float = 0.0) -> Spreads:
    """Means and mean squares of tables [..., seeds, items]. `step`: that of the values, as crossed.crossed has it."""
    *_, seeds, items = tables.shape
    mean, by_seed, by_item = tables.mean((-2, -1)), tables.mean(-1), tables.mean(-2)
    of_seeds = np.maximum(by_seed.var(-1, ddof=1) / seeds, step**2 / 6 / (seeds * items))
    if items == 1:
        return Spreads(seeds, 1, mean, of_seeds, np.zeros_like(mean), np.zeros_like(mean))
    rest = tables - by_seed[..., None] - by_item[..., None, :] + mean[..., None, None]
    both = (rest**2).sum((-2, -1)) / ((seeds - 1) * (items - 1)) / (seeds * items)
    return Spreads(seeds, items, mean, of_seeds, by_item.var(-1, ddof=1) / items, both)


def adjusted(p: Array, possible: int) -> Array:
    """paired.holm of each row of p [draws, claims]."""
    order = np.argsort(p, axis=1)
    times = np.minimum(possible, p.shape[1] - np.arange(p.shape[1]))
    in_order = np.minimum(np.maximum.accumulate(np.take_along_axis(p, order, 1) * times, axis=1), 1.0)
    found = np.empty_like(p)
    np.put_along_axis(found, order, in_order, 1)
    return found
