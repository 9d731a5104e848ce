"""What happens beside the training, after each optimizer step: checkpoints, evaluation, reports, a profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.assemble import State
from nai_xl.engine.console import Screen
from nai_xl.interfaces import Checkpointer, Evaluator, Tracker
from nai_xl.record.arm import ArmRecord


class NoHook:
    """A hook that does nothing. Subclasses override what they need."""

    def begin(self, around: Surroundings) -> None:
        pass

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        pass

    def end(self, step: int) -> None:
        pass


@dataclass(frozen=True)
class Surroundings:
    """What a hook of the group `hooks` is given: where the run lies, what is trained, and whom to tell.

    say: a line on the first rank's screen. tracker: of the first rank; the others' does nothing. start, steps: the step
    that the run begins after, and its last one.
    """

    run_dir: Path
    state: State
    tracker: Tracker
    say: Callable[[str], None]
    start: int
    steps: int


class ChosenHook(Protocol):
    """An option of the group `hooks`: a hook (engine.loop.Hook) that can be chosen. Every rank makes and calls it.

    It is called before a step is saved, evaluated and reported, so a UserError that it raises ends the run with the
    checkpoints of before. train/* in the values are the same on all ranks. The class says with changes_weights = False
    that looking on is all it does; without that its settings belong to the run's identity.
    """

    def begin(self, around: Surroundings) -> None:
        """Called once, before the first step."""
        ...

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None: ...
    def end(self, step: int) -> None: ...


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
            self.checkpoints.save(step)
            self.saved = step


@dataclass
class Evaluate(NoHook):
    """Each evaluator every `every` steps of its own, and at the end; inside `around`, such as with nothing compiled."""

    evaluators: Sequence[Evaluator]
    studio: Any
    strategy: Strategy
    around: Callable[[], AbstractContextManager[Any]]

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        due = [evaluator for evaluator in self.evaluators if last or step % evaluator.every == 0]
        if due and self.strategy.evaluates:
            with self.around():
                for evaluator in due:
                    values |= evaluator.run(step, self.studio)
        if due:
            self.strategy.wait()


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


class CountsSteps(Protocol):
    def step(self, number: int) -> None: ...


@dataclass
class Profile(NoHook):
    """Tells a profiler where a step ends."""

    profiler: CountsSteps

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        self.profiler.step(step)
