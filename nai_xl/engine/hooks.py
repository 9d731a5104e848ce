"""What happens beside the training, after each optimizer step: checkpoints, evaluation, reports, a profile."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from nai_xl.distributed import activity
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.assemble import State
from nai_xl.engine.console import Screen
from nai_xl.engine.loop import Hook
from nai_xl.errors import EvaluatorFailed, Stopped, UserError, with_kind
from nai_xl.interfaces import Checkpointer, Direction, Evaluator, Tracker
from nai_xl.record.arm import ArmRecord
from nai_xl.record.progress import ProgressRecord

LEARNING_RATE = "train/lr"  # part of every report of the training itself, on every rank


class NoHook:
    """A hook that does nothing. Subclasses override what they need."""

    def begin(self, around: Surroundings) -> None:
        pass

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        pass

    def end(self, step: int) -> None:
        pass

    def interrupted(self, step: int, values: dict[str, float]) -> None:
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


class ChosenHook(Hook, Protocol):
    """An option of the group `hooks`: a hook (engine.loop.Hook) that can be chosen. Every rank makes and calls it.

    It is called before a step is saved, evaluated and reported, so a UserError that it raises ends the run with the
    checkpoints of before. train/* in the values are the same on all ranks. The class says with changes_weights = False
    that looking on is all it does; without that its settings belong to the run's identity.
    """

    def begin(self, around: Surroundings) -> None:
        """Called once, before the first step."""
        ...


@dataclass
class Save(NoHook):
    """A checkpoint every `every` steps, at the end, and where the loop is asked to stop.

    It comes before evaluation and report, and holds what is still to be reported: a run that is continued there begins
    with them. Raises UserError at the step after a save that has failed.
    """

    checkpoints: Checkpointer
    every: int
    saved: int  # the step whose state is on disk: that which the loop begins with

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        self.checkpoints.check()
        if step % self.every == 0 or last:
            self.save(step, values)

    def save(self, step: int, values: Mapping[str, float]) -> None:
        if self.saved != step:
            activity.doing(f"saving step {step}")
            self.checkpoints.save(step, values)
            self.saved = step

    def end(self, step: int) -> None:
        self.save(step, {})
        self.checkpoints.finish()

    def interrupted(self, step: int, values: dict[str, float]) -> None:
        self.save(step, values)
        self.checkpoints.finish()


def due(evaluators: Mapping[str, Evaluator], step: int, *, last: bool) -> dict[str, Evaluator]:
    """Those whose turn it is after `step`."""
    return {name: one for name, one in evaluators.items() if last or step % one.every == 0}


@dataclass
class Evaluate(NoHook):
    """Each evaluator every `every` steps of its own, and at the end; inside `around`, such as with nothing compiled.

    evaluators: by their names in the config. Where `around` has raised Stopped, or an evaluator has failed, the values
    of the step are not complete: raises EvaluatorFailed on the rank that it has failed on, Stopped on the others.
    """

    evaluators: Mapping[str, Evaluator]
    studio: Any
    strategy: Strategy
    around: Callable[[], AbstractContextManager[Any]]

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        now = due(self.evaluators, step, last=last)
        if not now:
            return
        ended: Stopped | EvaluatorFailed | None = None
        activity.doing(f"evaluating at step {step}", lockstep=self.strategy.lockstep)
        if self.strategy.evaluates:
            try:
                with self.around():
                    self._run(now, step, values)
            except (Stopped, EvaluatorFailed) as error:
                ended = error
        if self.strategy.any(ended is not None):  # ranks that do not evaluate wait here
            raise ended if isinstance(ended, EvaluatorFailed) else Stopped(together=True)

    def _run(self, now: Mapping[str, Evaluator], step: int, values: dict[str, float]) -> None:
        for name, evaluator in now.items():
            activity.beat(f"evaluating at step {step}: {name}")
            with _Told(name, step):
                values |= evaluator.run(step, self.studio)


@dataclass(frozen=True)
class _Told:
    """Around an evaluator, which may be anybody's: a bug of it becomes EvaluatorFailed, which says how to go on."""

    name: str
    step: int

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            where = traceback.extract_tb(trace)[-1]
            raise EvaluatorFailed(
                f"evals.{self.name} failed at step {self.step}: {with_kind(error)} ({where.filename}:{where.lineno}). "
                "The step is saved: mend it and run the same command again, which begins with this evaluation, or "
                f"leave it out with '~evals.{self.name}'"
            ) from error


@dataclass
class KeepBest(NoHook):
    """Keeps the checkpoint at which `metric` was best, and makes one where there is none of that step.

    owner: the evaluator that measures it; None for what the training itself measures.
    """

    save: Save
    metric: str
    direction: Direction
    owner: str | None
    evaluators: Mapping[str, Evaluator]
    strategy: Strategy
    best: float | None

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        measured = self.owner in due(self.evaluators, step, last=last) if self.owner else LEARNING_RATE in values
        if not measured:
            return
        if self.strategy.first and self.metric not in values:
            known = ", ".join(sorted(values)) or "nothing"
            raise UserError(f"checkpoint.best={self.metric} was not measured at step {step}. Set one of: {known}")
        value = values.get(self.metric, math.nan)
        if self.strategy.any(self._better(value)):  # where one rank evaluates, only that one knows
            self.save.save(step, values)
            self.save.checkpoints.keep_best(step, value)
            self.best = value

    def _better(self, value: float) -> bool:
        if self.best is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < self.best if self.direction == "lower" else value > self.best


@dataclass
class Report(NoHook):
    """What there is to tell goes to the tracker, to arm.json and on the screen.

    once: what the first report tells besides.
    """

    tracker: Tracker
    note: ArmRecord
    screen: Screen
    images_per_step: int
    once: Mapping[str, float]

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        if values:
            values |= self.once
            self.once = {}
            self.tracker.log(step, values)
            self.note.reached(step, self.images_per_step)
            self.screen.report(step, values)

    def end(self, step: int) -> None:
        self.note.reached(step, self.images_per_step)
        self.screen.end()

    def interrupted(self, step: int, values: dict[str, float]) -> None:
        self.end(step)


@dataclass
class MarkReported(NoHook):
    """Notes that a step with a checkpoint has been evaluated and reported. The last hook."""

    progress: ProgressRecord
    save: Save

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        if self.save.saved == step:
            self.end(step)

    def end(self, step: int) -> None:
        self.progress.reported(step)


class CountsSteps(Protocol):
    def step(self, number: int) -> None: ...


@dataclass
class Profile(NoHook):
    """Tells a profiler where a step ends."""

    profiler: CountsSteps

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        self.profiler.step(step)
