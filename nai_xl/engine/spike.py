"""hooks=spike: says when the training loss leaves its usual range."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, ClassVar

from pydantic import Field

from nai_xl.engine.hooks import NoHook, Surroundings
from nai_xl.errors import UserError
from nai_xl.record.metrics import curves

NORMAL = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
FLOOR = 0.01  # of the usual loss: the smallest deviation, where losses are all but equal
LEAST = 8  # reports before anything is called unusual


@dataclass
class Spike(NoHook):
    """Watches train/loss at every report against the median of the last `window` reports.

    A spike is a loss that lies more than `deviations` deviations above it; a deviation is the median absolute deviation
    times 1.4826, as Leys et al. (2013, J. Exp. Soc. Psychol. 49, 764) advise in place of mean and standard deviation,
    which a spike spoils itself. It is taken as 1 % of the median at least. A spike is said once, however many reports
    it lasts. With `stop` it ends the run before that step is saved. A run that is continued has the reports of before
    in its window.
    """

    changes_weights: ClassVar[bool] = False

    window: Annotated[int, Field(ge=LEAST)] = 50
    deviations: Annotated[float, Field(gt=0)] = 8.0
    stop: bool = False
    recent: deque[float] = field(default_factory=deque, init=False, repr=False)
    inside: bool = field(default=False, init=False, repr=False)

    def begin(self, around: Surroundings) -> None:
        self.say = around.say
        self.recent = deque(maxlen=self.window)
        reported = curves(around.run_dir).get("train/loss", {})
        for step in sorted(step for step in reported if step <= around.start):
            self._take(reported[step])

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        if "train/loss" not in values:
            return
        before, loss = self.inside, values["train/loss"]
        usual, away = self._take(loss)
        if not self.inside or before:
            return
        told = f"step {step}: train/loss {loss:.4g} is a spike, {away:.1f} deviations above the usual {usual:.4g}"
        if self.stop:
            raise UserError(
                f"{told}. The newest checkpoint is of before it. Begin a new run with a lower optimizer.lr, or go on "
                "with hooks.spike.stop=false"
            )
        self.say(told)

    def _take(self, loss: float) -> tuple[float, float]:
        """Take in the next loss: the median of those before, and how many deviations this one lies above it."""
        usual = median(self.recent) if self.recent else loss
        deviation = NORMAL * median(abs(x - usual) for x in self.recent) if self.recent else 0.0
        deviation = max(deviation, FLOOR * abs(usual))
        away = (loss - usual) / deviation if deviation else 0.0
        self.inside = len(self.recent) >= LEAST and away > self.deviations
        self.recent.append(loss)
        return usual, away
