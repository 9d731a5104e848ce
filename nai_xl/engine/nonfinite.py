"""What becomes of a loss or a gradient that is not finite: the run stops, leaves its step out, or goes back.

No such step has moved a weight: the update is left out on the device (optimizer/update.py). Here it is decided what
follows, and said what it comes from. The report is put together only when it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from nai_xl.errors import UserError

Policy = Literal["stop", "skip", "rewind"]
SHOWN = 4  # samples that a report describes one by one
GROWN = 10.0  # a loss that is so many times the usual one has grown
HUGE = 1e4  # the largest weights of trained networks are below 100


class Sample(NamedTuple):
    """One sample of the run. axis: where its loss is reported, such as its timestep. position: -1 if not known."""

    position: int
    item: int
    axis: float


class Traced(NamedTuple):
    """What a task knows of a sample. fault: what is wrong with its inputs and how to mend that, if anything is."""

    file: str
    level: str
    fault: str | None = None


@dataclass(frozen=True)
class Fault:
    """What was not finite since the last look.

    samples: those whose loss was not finite. steps: the optimizer steps, counted from 1, of which a loss or the
    gradient was not. history: the mean finite loss of each of the last steps, by step.
    """

    samples: Sequence[Sample]
    steps: Sequence[int]
    history: dict[int, float]

    def told(self, traced: Sequence[Traced]) -> str:
        """Where, and which samples: positions, files, noise levels."""
        where = f"step {self.steps[0]}" + (f" and {len(self.steps) - 1} more" if len(self.steps) > 1 else "")
        if not self.samples:
            return f"{where}: the gradient is not finite, although every loss is"
        pairs = zip(self.samples, traced, strict=False)
        named = "; ".join(f"{t.file} (position {s.position}{t.level and ', '}{t.level})" for s, t in pairs)
        more = f"; and {len(self.samples) - len(traced)} more" if len(self.samples) > len(traced) else ""
        return f"{where}: the loss is not finite of {named}{more}"

    def growth(self) -> str | None:
        """From when on the loss grew before it broke; None if it did not."""
        steps = sorted(self.history)
        losses = [self.history[step] for step in steps]
        if len(losses) < 2:
            return None
        usual = sorted(losses)[(len(losses) - 1) // 3]  # below the median: the growth may be long
        low = [step for step, loss in zip(steps, losses, strict=True) if loss <= GROWN * abs(usual)]
        if not low or losses[-1] <= GROWN * abs(usual):
            return None
        since = next(step for step in steps if step > low[-1])
        return f"the loss had been growing since step {since}, from {self.history[low[-1]]:.4g} to {losses[-1]:.4g}"


class OnFault(Protocol):
    """Decides what follows. `left_out`: steps that were left out of the run before. Raises UserError to end it."""

    def __call__(self, fault: Fault, left_out: int) -> None: ...


def refuse(fault: Fault, left_out: int) -> None:
    """Ends every run, with no more words than a meter alone can find."""
    items = sorted({sample.item for sample in fault.samples})
    what = fault.told([Traced(f"image number {item} of the index", "") for item in items[:SHOWN]])
    raise UserError(f"{what}. No weight was moved by it. Lower optimizer.lr, or set precision=fp32")


class HasLearned(Protocol):
    """What a Guard needs of engine.assemble.State."""

    strategy: Any
    trainable: Any
    optimizer: Any


@dataclass
class Guard:
    """Finds the cause, and follows run.on_nonfinite. Every rank calls it with the same fault.

    trace: what the task knows of a sample. autocast: what the forward pass computes in. say: words for the first rank's
    screen. note: a row of the run's record. go_back: restore weights, optimizer and average from the newest checkpoint;
    its step, 0 where there is none.
    """

    policy: Policy
    limit: int
    state: HasLearned
    trace: Callable[[Sample], Traced]
    autocast: str
    say: Callable[[str], None]
    note: Callable[..., None]
    go_back: Callable[[], int]

    def __call__(self, fault: Fault, left_out: int) -> None:
        traced = [self.trace(sample) for sample in fault.samples[:SHOWN]]
        told, count = fault.told(traced), left_out + len(fault.steps)
        weights = self._weights()
        cause = self._cause(fault, traced, weights)
        if self.policy == "stop" or (self.policy == "skip" and weights.broken):
            skip = "" if weights.broken else " No weight was moved by it; run.on_nonfinite=skip leaves such steps out."
            raise UserError(f"{told}. {cause}{skip}")
        if count > self.limit:
            raise UserError(
                f"{told}. {cause} {count} steps of this run were not finite, more than run.max_nonfinite={self.limit}."
            )
        files = [t.file for t in traced]
        if self.policy == "skip":
            self.say(f"{told}. {cause} Left out ({count} of at most run.max_nonfinite={self.limit} steps)")
            self.note(step=fault.steps[-1], steps=list(fault.steps), action="skip", files=files)
            return
        back = self.go_back()
        if not back:
            raise UserError(
                f"{told}. {cause} There is no checkpoint to go back to yet: lower run.checkpoint_every, or set "
                "run.on_nonfinite=skip."
            )
        self.say(
            f"{told}. {cause} Weights, optimizer and average are those of step {back} again, and the run goes on after "
            f"step {fault.steps[-1]} ({count} of at most run.max_nonfinite={self.limit} steps)"
        )
        self.note(step=fault.steps[-1], steps=list(fault.steps), action="rewind", back_to=back, files=files)

    def _cause(self, fault: Fault, traced: Sequence[Traced], weights: Weights) -> str:
        """A sentence or two: what it comes from, as far as can be seen, and what to set."""
        rate = f"optimizer.lr ({self.state.optimizer.param_groups[0]['lr']:.3g} at this step)"
        if faults := list(dict.fromkeys(t.fault for t in traced if t.fault)):
            return " ".join(faults)
        if growth := fault.growth():
            return f"{growth[0].upper()}{growth[1:]}: begin a new run with a lower {rate}."
        if weights.broken:
            more = f"{len(weights.broken)} of {weights.tensors} tensors are not, first {weights.broken[0]}"
            return f"The trained weights are not finite themselves ({more}): begin a new run with a lower {rate}."
        if weights.largest > HUGE:
            return f"The weights have grown to {weights.largest:.3g}: begin a new run with a lower {rate}."
        if self.autocast == "fp16":
            return f"Inputs and weights are finite, so fp16 may be too narrow: set precision=bf16, or a lower {rate}."
        wider = " or precision=fp32" if self.autocast == "bf16" else ""
        return f"Inputs and weights are finite: set a lower {rate}{wider}, or look at these images."

    def _weights(self) -> Weights:
        """Collective: one pass over the trained weights."""
        held = self.state.strategy.held(self.state.trainable.parameters)
        norms = {name: largest(tensor) for name, tensor in held.items()}
        broken = [name for name, norm in norms.items() if not norm.isfinite()]
        broken = list(dict.fromkeys(self.state.strategy.gather_objects(broken)))
        finite = [norm.item() for norm in norms.values() if norm.isfinite()]
        return Weights(len(norms), broken, max(self.state.strategy.gather_objects([max(finite, default=0.0)])))


class Weights(NamedTuple):
    """tensors: how many. broken: the names of those that are not finite. largest: absolute value in the others."""

    tensors: int
    broken: Sequence[str]
    largest: float


def largest(tensor: Tensor) -> Tensor:
    """The largest absolute value, a scalar; NaN if one is."""
    if not tensor.numel():
        return torch.zeros(())
    return tensor.abs().max().float()
