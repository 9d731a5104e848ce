"""How the permitted chance of a false verdict is shared out among several looks at a sweep whose seeds come by and by.

The level of each look is what a spending function has gained since the look before ([Lan]). By Bonferroni's inequality
the levels need only add up to LEVEL, whatever the statistic and however the looks depend on each other. Boundaries from
the joint distribution of the looks would be higher, but that of crossed.Crossed.p is not known.
benchmarks/sequential.py simulates what this costs: little with three looks, much with eight.

[Lan] Lan and DeMets, Discrete sequential boundaries for clinical trials, Biometrika 70 (1983) 659.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scipy import special

from nai_xl.compare.statistics.crossed import LEVEL

LEAST_SEEDS = 3  # of a verdict: two show whether a sweep runs, but know their spread to a factor of 30 only
TINY = 1e-300  # a level that a look after few of very many seeds may have
LOOKS = (3, 6)  # where none are named: a look after every seed would cost much power (docs/compare.md)

DECIDED = "decided"  # of sweep.seeds_until


def spent(share: float, level: float = LEVEL) -> float:
    """2 - 2 Phi(z / sqrt(share)), z the two-sided critical value of `level`: the function of [Lan] that resembles the
    boundary of O'Brien and Fleming. It spends little early: 1.1 % of 5 % after three seeds of five.
    """
    if not 0 < share < 1:
        return 0.0 if share <= 0 else level
    return float(2 * special.ndtr(special.ndtri(level / 2) / math.sqrt(share)))


@dataclass(frozen=True)
class Plan:
    """How many seeds each arm is to have, and after how many of them it is judged; the last look is at all of them."""

    seeds: int
    looks: tuple[int, ...]

    @classmethod
    def of(cls, seeds: int, looks: Iterable[int] = ()) -> Plan:
        return cls(seeds, tuple(sorted({look for look in looks if LEAST_SEEDS <= look < seeds} | {seeds})))

    @property
    def levels(self) -> dict[int, float]:
        """look -> its level. They add up to LEVEL."""
        up_to = [spent(look / self.seeds) for look in self.looks]
        return {look: now - before for look, now, before in zip(self.looks, up_to, [0.0, *up_to[:-1]], strict=True)}

    def level(self, seeds: int, planned: bool) -> float:
        """Of a look at so many seeds. One that is not planned has all that would have been spent until then, which adds
        to the chance of a false verdict.
        """
        return self.levels[seeds] if planned else spent(seeds / self.seeds)


def plan_of(node: Mapping[str, Any]) -> Plan | None:
    """The plan that the node `sweep` of a config has; None if it names no number of seeds, as that of an old run."""
    by_rounds = node.get("seeds_until") == DECIDED
    seeds = node.get("max_seeds") if by_rounds else node.get("seeds")
    if not seeds:
        return None
    unsaid = LOOKS if by_rounds or node.get("prune") else ()
    return Plan.of(int(seeds), node.get("looks") or unsaid)
