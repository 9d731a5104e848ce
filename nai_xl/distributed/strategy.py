"""The contract of a distributed engine, and the one that accelerate's process group gives: none and ddp share it.

The loop, the checkpoint, the evaluators and the export call a strategy on EVERY rank, in the same order. The strategy
decides who acts. Files and words are the first rank's: what a collective brings together, it writes and says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field
from torch import Tensor, nn

from nai_xl.distributed import activity
from nai_xl.distributed.agreement import Agreement
from nai_xl.distributed.team import Team, team
from nai_xl.distributed.weights import Weights
from nai_xl.interfaces import Ema, Precision, Stateful
from nai_xl.memory.action import MemoryAction
from nai_xl.optimizer.ema import NoEma
from nai_xl.optimizer.update import Update, WholeUpdate, norm_of

T = TypeVar("T")
Parameters = Mapping[str, nn.Parameter]
MakeOptimizer = Callable[[Parameters], torch.optim.Optimizer]
Minutes = Annotated[float, Field(gt=0)]
TIMEOUT = 15.0  # minutes


class Engine:
    """What an option of the group `distributed` is.

    several: whether it can use more than one process. shards: whether a process keeps a part of the model only.
    timeout: minutes that a process may be silent, or all of them without progress, until the run ends.
    """

    several: ClassVar[bool]
    shards: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False  # by roundings at most
    timeout: Minutes = TIMEOUT

    def refuse_beside(
        self, actions: Sequence[MemoryAction], optimizer: Callable[..., Any], precision: Precision
    ) -> None:
        """Raise UserError, naming the override, if the engine cannot train with these choices.

        actions: the memory actions. optimizer: the class or a partial of it, not yet given parameters.
        """

    def start(self, precision: Precision) -> Strategy:
        """Join the other processes."""
        raise NotImplementedError


@dataclass(frozen=True)
class StepSettings:
    """How gradients become a step: images of a micro-batch, micro-batches of a step, and the norm that limits it."""

    batch_size: int = 1
    grad_accum: int = 1
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Wrapped:
    """What an engine has made of a network.

    module: what the loss calls. parameters: name -> what the optimizer moves and the average follows: this rank's rows
    where the network is sharded. optimizer: what is stepped; `update` steps it. None where nothing was to be made.
    remarks: sentences that a person should read before training.
    """

    module: nn.Module
    parameters: Parameters
    optimizer: Any = None
    update: Update | None = None
    remarks: Sequence[str] = ()


class Strategy(Protocol):
    """How one run spreads over `world` processes, of which this one is number `rank`.

    evaluates: this rank takes part in evaluation; where the model is whole on every rank, the first suffices.
    lockstep: all ranks evaluate, and make the same passes.
    """

    rank: int
    world: int
    device: torch.device
    lockstep: ClassVar[bool]

    @property
    def evaluates(self) -> bool: ...

    @property
    def first(self) -> bool:
        """Whether this rank speaks and writes files."""
        ...

    @property
    def scaler(self) -> Any:
        """The loss scaler of fp16; None for other precisions."""
        ...

    def wrap(
        self, module: nn.Module, parameters: Parameters, make: MakeOptimizer | None, settings: StepSettings
    ) -> Wrapped:
        """Spread a network over the processes. parameters: those of it that are trained, by name.

        make: makes the optimizer of Wrapped.parameters, and of others beside them. None: no optimizer is wanted.
        """
        ...

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of a micro-batch; only the `last` one must exchange gradients."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def rehearse(self, module: nn.Module, loss: Callable[[], Tensor], parameter: nn.Parameter) -> None:
        """Run forward and backward once and leave no gradient, so that what compiles has compiled.

        parameter: the first that is trained.
        """
        ...

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm of the whole gradient, of which this rank has `gradients`; a scalar on the device."""
        ...

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

    @property
    def team(self) -> Team:
        """How the ranks share out work of unequal length."""
        ...

    def keep(self, ema: Callable[..., Ema], parameters: Parameters) -> Ema:
        """The average that this rank keeps, of Wrapped.parameters or of its part of them; NoEma of none, if another
        rank keeps it. ema: called with `parameters`.
        """
        ...

    def held(self, parameters: Parameters) -> Mapping[str, Tensor]:
        """What this rank keeps of Wrapped.parameters: all numbers of all of them, over all ranks."""
        ...

    def full(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Collective. Each rank passes its part of tensors that are named as Wrapped.parameters, such as averages; the
        first rank gets the whole, other ranks may get nothing.
        """
        ...

    def unwrap(self, module: nn.Module) -> None:
        """Collective. Make the network that was given to `wrap` a plain one again, on the first rank: whole, with its
        state as it is, in the same object. It is not trained or called by other ranks any more.
        """
        ...

    def stateful(self, parameters: Parameters, optimizer: Any, ema: Ema) -> dict[str, Stateful]:
        """The parts of a checkpoint `weights`, `ema` and `optimizer`, in a form that every engine and world reads."""
        ...


@dataclass
class Ranks:
    """accelerate's process group, and what every engine does with it."""

    accelerator: Accelerator
    lockstep: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def evaluates(self) -> bool:
        return self.lockstep or self.first

    def held(self, parameters: Parameters) -> Mapping[str, Tensor]:
        return {name: p.detach() for name, p in parameters.items()}

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

    @cached_property
    def team(self) -> Team:
        return team(self.rank, self.world)

    # --- as it is where every rank holds the whole weights ------------------------------------------------------------

    def keep(self, ema: Callable[..., Ema], parameters: Parameters) -> Ema:
        return ema(parameters=parameters) if self.first else NoEma(parameters={})

    def full(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors

    def unwrap(self, module: nn.Module) -> None:
        pass


@dataclass
class DataParallel(Ranks):
    """Whole copies of the model on accelerate's process group, gradients averaged; one process is the smallest case."""

    @property
    def scaler(self) -> Any:
        return self.accelerator.scaler

    def wrap(
        self, module: nn.Module, parameters: Parameters, make: MakeOptimizer | None, settings: StepSettings
    ) -> Wrapped:
        if make is None:
            return Wrapped(self.accelerator.prepare(module), parameters)
        inner = make(parameters)
        prepared, stepped = self.accelerator.prepare(module, inner)
        update = WholeUpdate(self, stepped, inner, parameters.values(), settings.max_grad_norm)
        return Wrapped(prepared, parameters, stepped, update)

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def rehearse(self, module: nn.Module, loss: Callable[[], Tensor], parameter: nn.Parameter) -> None:
        """The gradient of the first parameter alone: it runs all blocks' backward passes, keeps no other gradient, and
        calls none of the hooks that wait for one to be accumulated.
        """
        with self.accumulating(module, last=False):
            torch.autograd.grad(loss(), parameter)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return norm_of(gradients)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, limit)
        return norm

    def stateful(self, parameters: Parameters, optimizer: Any, ema: Ema) -> dict[str, Stateful]:
        return {"weights": Weights(parameters), "ema": ema, "optimizer": optimizer}
