"""What happens beside the training, after each optimizer step: checkpoints, evaluation, reports, a profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from nai_xl.distributed import activity
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.console import Screen
from nai_xl.errors import Stopped
from nai_xl.interfaces import Checkpointer, Evaluator, Tracker
from nai_xl.record.arm import ArmRecord


class NoHook:
    """A hook that does nothing. Subclasses override what they need."""

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        pass

    def end(self, step: int) -> None:
        pass

    def interrupted(self, step: int, values: dict[str, float]) -> None:
        pass


@dataclass
class Save(NoHook):
    """A checkpoint every `every` steps, at the end, and where the loop is asked to stop."""

    checkpoints: Checkpointer
    every: int
    saved: int  # the step whose state is on disk: that which the loop begins with

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        if step % self.every == 0 or last:
            self.end(step)

    def end(self, step: int) -> None:
        if self.saved != step:
            activity.doing(f"saving step {step}")
            self.checkpoints.save(step)
            self.saved = step

    def interrupted(self, step: int, values: dict[str, float]) -> None:
        self.end(step)


@dataclass
class Evaluate(NoHook):
    """Each evaluator every `every` steps of its own, and at the end; inside `around`, such as with nothing compiled.

    Raises Stopped on every rank when `around` has raised it on one: the values of the step are not complete.
    """

    evaluators: Sequence[Evaluator]
    studio: Any
    strategy: Strategy
    around: Callable[[], AbstractContextManager[Any]]

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        due = [evaluator for evaluator in self.evaluators if last or step % evaluator.every == 0]
        stopped = False
        if due:
            activity.doing(f"evaluating at step {step}", lockstep=not self.strategy.whole)
        if due and self.strategy.evaluates:
            try:
                with self.around():
                    for evaluator in due:
                        activity.beat(f"evaluating at step {step}: {type(evaluator).__name__}")
                        values |= evaluator.run(step, self.studio)
            except Stopped:
                stopped = True
        if due and self.strategy.any(stopped):  # ranks that do not evaluate wait here
            raise Stopped(together=True)


@dataclass
class Report(NoHook):
    """What there is to tell goes to the tracker, to arm.json and on the screen."""

    tracker: Tracker
    note: ArmRecord
    screen: Screen
    images_per_step: int

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        if values:
            self.tracker.log(step, values)
            self.note.reached(step, self.images_per_step)
            self.screen.report(step, values)

    def end(self, step: int) -> None:
        self.note.reached(step, self.images_per_step)
        self.screen.end()

    def interrupted(self, step: int, values: dict[str, float]) -> None:
        self.end(step)


class CountsSteps(Protocol):
    def step(self, number: int) -> None: ...


@dataclass
class Profile(NoHook):
    """Tells a profiler where a step ends."""

    profiler: CountsSteps

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        self.profiler.step(step)
