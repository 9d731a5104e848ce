"""The training loop, shared by every configuration. It is handed built objects and knows no config."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field
from torch import nn

from nai_xl.distributed import activity
from nai_xl.engine.assemble import State
from nai_xl.engine.nonfinite import Policy
from nai_xl.engine.stop import Stop
from nai_xl.errors import EvaluatorFailed, Stopped, UserError
from nai_xl.interfaces import Losses
from nai_xl.optimizer.update import poisoned

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class RunSettings:
    """The loop's own settings. Images are counted over all processes; `every` counts optimizer steps.

    Exactly one of max_images and epochs says how long to train. `chunk` consecutive images share a bucket; by default
    those of one micro-batch on all processes. Runs with equal chunks are equal on any number of processes.

    A step whose loss or gradient is not finite never moves a weight. on_nonfinite says what follows: `stop` ends the
    run with a report of the cause. `skip` leaves the step out and goes on; the average counts it. `rewind` takes
    weights, optimizer and average back to the newest checkpoint and goes on after that step, so that the data between
    are passed over, as PaLM was trained past its spikes (2204.02311, section 5.1); it waits for the device once a step.
    More than max_nonfinite such steps end the run. A run that stopped so can be continued with another setting.
    """

    without_effect: ClassVar[tuple[str, ...]] = (
        "log_every", "checkpoint_every", "keep_checkpoints", "workers", "on_nonfinite", "max_nonfinite",
    )  # fmt: skip

    seed: int
    batch_size: Count
    max_images: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    grad_accum: Count = 1
    chunk: Count | None = None
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    log_every: Count = 10
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2
    workers: Annotated[int, Field(ge=0)] = 0
    on_nonfinite: Policy = "stop"
    max_nonfinite: Annotated[int, Field(ge=0)] = 10

    def __post_init__(self) -> None:
        if (self.max_images is None) == (self.epochs is None):
            raise UserError("say how long to train with one of run.max_images and run.epochs; set the other to null")

    def images_per_step(self, world: int) -> int:
        return self.batch_size * self.grad_accum * world

    def chunk_size(self, world: int) -> int:
        """Images that share a bucket. Raises UserError when micro-batches would not divide it."""
        chunk = self.chunk or self.batch_size * world
        if chunk % (self.batch_size * world):
            raise UserError(
                f"run.chunk={chunk} must be a multiple of run.batch_size x processes = {self.batch_size * world}"
            )
        return chunk

    def steps(self, images: int, world: int) -> int:
        """Optimizer steps of the whole run over a data set of `images`."""
        wanted = self.max_images if self.max_images is not None else round((self.epochs or 0) * images)
        return max(1, -(-wanted // self.images_per_step(world)))


class Hook(Protocol):
    """What happens beside the training. Called on every rank after every optimizer step, in the order of the list.

    values: what the step has to report so far, {} between reports; a hook may add to it.
    """

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None: ...

    def end(self, step: int) -> None:
        """The loop ends after `step`, be it the last one or not."""
        ...

    def interrupted(self, step: int, values: dict[str, float]) -> None:
        """Instead of `end`: a signal or a bug has ended an evaluation, and `step` has not been reported."""
        ...


@dataclass
class Training:
    """Everything the loop works with, built and bound together."""

    state: State
    loss: Callable[[nn.Module, Any], Losses]
    batches: Iterator[Any]  # on the device
    hooks: Sequence[Hook] = ()


def train(
    run: RunSettings,
    parts: Training,
    *,
    start: int,
    steps: int,
    stop: Stop,
    unreported: Mapping[str, float] | None = None,
) -> int:
    """Train from optimizer step `start` to `steps`, or until asked to stop; the step reached.

    unreported: what step `start` has still to report, where it was saved and not evaluated and reported; else None.
    Raises Stopped on every rank when asked to stop during an evaluation: the step is saved, and not yet reported.
    """
    step, state, strategy = start, parts.state, parts.state.strategy
    state.module.train()
    with stop.deferred():
        if unreported is not None:
            _beside(parts, step, dict(unreported), last=step == steps)
        while step < steps and not stop.due(strategy):
            activity.doing(f"training step {step + 1}", lockstep=True)
            rate = state.lr.set(step)
            for micro in range(run.grad_accum):
                waiting = time.perf_counter()
                batch = next(parts.batches)
                waited = time.perf_counter() - waiting
                activity.tick()
                with strategy.accumulating(state.module, last=micro + 1 == run.grad_accum):
                    losses = parts.loss(state.module, batch)
                    strategy.backward(poisoned(losses.values.mean() / run.grad_accum))
                state.meter.add(losses, batch, waited=waited)
            strategy.average(state.learned)
            step += 1
            state.meter.add_grad_norm(state.update(), step)
            state.ema.update(step)
            if run.on_nonfinite == "rewind":  # the next step's weights depend on it
                state.meter.look()
            values: dict[str, float] = {}
            if step % run.log_every == 0 or step == steps:
                # a run that is continued later reports the whole interval, as if it had not paused here
                values |= state.meter.read(lr=rate, clear=step % run.log_every == 0)
            _beside(parts, step, values, last=step == steps)
        for hook in parts.hooks:
            hook.end(step)
    return step


def _beside(parts: Training, step: int, values: dict[str, float], *, last: bool) -> None:
    with parts.state.meter.paused():
        try:
            for hook in parts.hooks:
                hook(step, values, last=last)
        except (Stopped, EvaluatorFailed):
            for hook in parts.hooks:
                hook.interrupted(step, values)
            raise
