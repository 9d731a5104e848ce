"""The training loop, shared by every configuration. It is handed built objects and knows no config."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, ClassVar

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import nn

from nai_xl.diffusion.objective import Objective
from nai_xl.errors import UserError
from nai_xl.interfaces import Batch, Checkpointer, Ema, Tracker
from nai_xl.optimizer.lr import LearningRate
from nai_xl.optimizer.update import Update

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class RunSettings:
    """The loop's own settings. Images are counted over all processes; `every` counts optimizer steps.

    Exactly one of max_images and epochs says how long to train. `chunk` consecutive images share a bucket; by default
    those of one micro-batch on all processes. Runs with equal chunks are equal on any number of processes.
    """

    without_effect: ClassVar[tuple[str, ...]] = ("log_every", "checkpoint_every", "keep_checkpoints", "workers")

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


class Stop:
    """Asks the loop to end after the step in hand: SIGINT and SIGTERM once; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def requested(self, accelerator: Accelerator, *, due: bool) -> bool:
        """Whether any process was asked to stop. Several processes ask each other only when `due`: it costs a wait."""
        if accelerator.num_processes == 1 or not due:
            return self.asked and accelerator.num_processes == 1
        flag = torch.tensor(float(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())


@dataclass
class Training:
    """Everything the loop works with, built and bound together."""

    accelerator: Accelerator
    unet: nn.Module
    update: Update
    lr: LearningRate
    objective: Objective
    ema: Ema
    batches: Iterator[Batch]  # on the device
    meter: Any
    tracker: Tracker
    checkpoints: Checkpointer
    evaluate: Callable[[int, bool], dict[str, float]]  # step, last -> values
    on_report: Callable[[int, dict[str, float]], None]
    on_step: Callable[[int], None]  # after every optimizer step, its report included


def train(run: RunSettings, parts: Training, *, start: int, steps: int, stop: Stop) -> int:
    """Train from optimizer step `start` to `steps`, or until asked to stop; the step reached, whose state is saved."""
    step = saved = start
    parts.unet.train()
    while step < steps and not stop.requested(parts.accelerator, due=step % run.log_every == 0):
        rate = parts.lr.set(step)
        for micro in range(run.grad_accum):
            waiting = time.perf_counter()
            batch = next(parts.batches)
            waited = time.perf_counter() - waiting
            with _no_sync_unless_last(parts, micro, run.grad_accum):
                losses, level = parts.objective(parts.unet, batch)
                parts.accelerator.backward(losses.mean() / run.grad_accum)
            parts.meter.add(losses, level, batch, waited=waited)
        _average_learned_gradients(parts)
        parts.meter.add_grad_norm(parts.update())
        step += 1
        parts.ema.update(step)
        values: dict[str, float] = {}
        if step % run.log_every == 0 or step == steps:
            # a run that is continued later reports the whole interval, as if it had not paused here
            values |= parts.meter.read(lr=rate, clear=step % run.log_every == 0)
        with parts.meter.paused():
            parts.on_step(step)
            if step % run.checkpoint_every == 0 or step == steps:
                saved = _save(parts, step)
            values |= parts.evaluate(step, step == steps)
            if values:
                parts.tracker.log(step, values)
                parts.on_report(step, values)
    if saved != step:
        _save(parts, step)
    return step


def _no_sync_unless_last(parts: Training, micro: int, grad_accum: int) -> Any:
    return nullcontext() if micro + 1 == grad_accum else parts.accelerator.no_sync(parts.unet)


def _average_learned_gradients(parts: Training) -> None:
    """Average a learned weighting's gradients over the processes; DistributedDataParallel does the network's only."""
    if parts.accelerator.num_processes > 1:
        for parameter in parts.objective.learned.parameters():
            if parameter.grad is not None:
                parameter.grad = parts.accelerator.reduce(parameter.grad, "mean")


def _save(parts: Training, step: int) -> int:
    parts.meter.collect()
    parts.accelerator.wait_for_everyone()
    if parts.accelerator.is_main_process:
        parts.checkpoints.save(step)
    parts.accelerator.wait_for_everyone()
    return step


@dataclass
class Pace:
    """Images a step and a chunk as a Stateful: a run continued at another pace would skip or repeat images."""

    images_per_step: int
    chunk: int

    def state_dict(self) -> dict[str, Any]:
        return {"images_per_step": self.images_per_step, "chunk": self.chunk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError when the run began otherwise."""
        if state != self.state_dict():
            raise UserError(
                f"this run began with {state['images_per_step']} images a step in chunks of {state['chunk']}, now it "
                f"would have {self.images_per_step} in chunks of {self.chunk}. Start it on as many processes as before "
                "or set name=NAME to begin a new run."
            )


class ScalerState:
    """The fp16 loss scaler as a Stateful; empty for other precisions."""

    def __init__(self, accelerator: Accelerator):
        self.scaler = accelerator.scaler

    def state_dict(self) -> dict[str, Any]:
        return dict(self.scaler.state_dict()) if self.scaler else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler:
            self.scaler.load_state_dict(state)
