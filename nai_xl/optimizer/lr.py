"""Learning-rate curves, as factors of the optimizer's own rate over the share of the run that is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from nai_xl.interfaces import declare


class HasGroups(Protocol):
    """An optimizer, or several seen as one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1))


@declare(open_ended=True)
def constant(step: int, total: int, *, warmup: int = 0) -> float:
    """1 after `warmup` steps of linear rise."""
    return _warm(step, warmup)


def linear(step: int, total: int, *, warmup: int = 0, final: float = 0.0) -> float:
    """From 1 to `final` along a line over the whole run."""
    return _warm(step, warmup) * (1 - (1 - final) * min(1.0, step / total))


def cosine(step: int, total: int, *, warmup: int = 0, final: float = 0.0) -> float:
    """From 1 to `final` along half a cosine; Loshchilov and Hutter, 1608.03983, without restarts."""
    return _warm(step, warmup) * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))))


class LearningRate:
    """Sets the rate of every parameter group before a step. It has no state: the step number says everything, so
    neither several GPUs nor a resumed run can put it out of step.
    """

    def __init__(self, optimizer: HasGroups, curve: Callable[..., float], total: int):
        self.optimizer, self.curve, self.total = optimizer, curve, total
        self.base = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Apply the rate of optimizer step number `step` (0 is the first) and return the first group's."""
        factor = self.curve(step, self.total)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * factor
        return float(self.base[0] * factor)
