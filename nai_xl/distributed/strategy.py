"""The contract of a distributed engine, and the one that accelerate's process group gives: none and ddp share it.

The loop, the checkpoint, the evaluators and the export call a strategy on EVERY rank, in the same order. The strategy
decides who acts. Files and words are the first rank's: what a collective brings together, it writes and says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from nai_xl.distributed import activity
from nai_xl.distributed.agreement import Agreement

T = TypeVar("T")


class Strategy(Protocol):
    """How one run spreads over `world` processes, of which this one is number `rank`.

    whole: every rank holds the whole model and, after the backward pass, its whole gradient. evaluates: this rank takes
    part in evaluation; where the model is whole, the first rank suffices.
    """

    rank: int
    world: int
    device: torch.device
    whole: bool
    evaluates: bool

    @property
    def first(self) -> bool:
        """Whether this rank speaks and writes files."""
        ...

    @property
    def scaler(self) -> Any:
        """The loss scaler of fp16; None for other precisions."""
        ...

    def wrap(self, module: nn.Module, optimizer: Any | None = None) -> tuple[nn.Module, Any]:
        """The module that the loss calls and the optimizer that the update steps; None stays None."""
        ...

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of a micro-batch; only the `last` one exchanges gradients."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Clip the gradients to a global norm of `limit`; the norm before, over all ranks, a scalar on the device."""
        ...

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of parameters that `wrap` was not given, over all ranks."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of every rank -> [world n, ...] on all of them."""
        ...

    def gather_objects(self, rows: list[T]) -> list[T]:
        """The lists of all ranks as one, on all of them."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; on all of them."""
        ...

    def ask(self, flag: bool) -> Callable[[], bool]:
        """`any`, begun now and answered by the function returned. It never waits for the device."""
        ...

    def wait(self) -> None:
        """Return when every rank has got here."""
        ...

    def kept(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, Tensor]:
        """The parameters whose average this rank keeps; {} if another rank keeps them."""
        ...

    def full(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Collective. Each rank passes its own part; the first rank gets the whole."""
        ...


@dataclass
class DataParallel:
    """Whole copies of the model on accelerate's process group, gradients averaged; one process is the smallest case."""

    accelerator: Accelerator
    whole: bool = True

    def __post_init__(self) -> None:
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.evaluates = self.first

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def scaler(self) -> Any:
        return self.accelerator.scaler

    def wrap(self, module: nn.Module, optimizer: Any | None = None) -> tuple[nn.Module, Any]:
        if optimizer is None:
            return self.accelerator.prepare(module), None
        prepared, stepped = self.accelerator.prepare(module, optimizer)
        return prepared, stepped

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, limit)
        return norm

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.world > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def gather(self, rows: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(rows)
        return gathered

    def gather_objects(self, rows: list[T]) -> list[T]:
        with activity.waiting():
            return list(gather_object(rows))

    def any(self, flag: bool) -> bool:
        with activity.waiting():
            return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum").item())

    @cached_property
    def _agreement(self) -> Agreement:
        return Agreement()

    def ask(self, flag: bool) -> Callable[[], bool]:
        return self._agreement.ask(flag) if self.world > 1 else lambda: flag

    def wait(self) -> None:
        with activity.waiting():
            self.accelerator.wait_for_everyone()

    def kept(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, Tensor]:
        return parameters if self.first else {}

    def full(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors
