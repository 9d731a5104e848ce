"""From what was built to what the loop steps: the wrapped network, its optimizer, the update, the rate, the average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nai_xl.adapter.trainable import Trainable
from nai_xl.distributed.strategy import Parameters, StepSettings, Strategy
from nai_xl.engine.meter import Meter
from nai_xl.errors import UserError
from nai_xl.interfaces import Ema, Stateful
from nai_xl.optimizer.lr import LearningRate
from nai_xl.optimizer.stochastic import keep_layout
from nai_xl.optimizer.update import Update, UpdateInBackward


@dataclass
class State:
    """Everything that a step changes, and what it is changed with."""

    strategy: Strategy
    trainable: Trainable
    module: nn.Module  # the trainable's, as the strategy has wrapped it: what the loss calls
    learned: Sequence[nn.Parameter]  # trained beside the module, such as those of a learned weighting
    optimizer: Any  # one, or several seen as one
    update: Update
    lr: LearningRate
    ema: Ema
    meter: Meter
    remarks: Sequence[str] = ()  # of the strategy: sentences that a person should read before training

    def averages(self) -> Mapping[str, Tensor]:
        """Collective. The averaged weights by name: all of them on the first rank."""
        return self.strategy.full(self.ema.averages())

    def delivered(self) -> dict[str, Tensor]:
        """Collective, after the last step. What the trainable delivers of the averages; {} but on the first rank."""
        averages = self.averages()
        self.strategy.unwrap(self.trainable.module)
        return self.trainable.deliver(averages) if self.strategy.first else {}

    def stateful(self) -> dict[str, Stateful]:
        """The parts that a checkpoint saves, by name."""
        parts = self.strategy.stateful(self.trainable.parameters, self.optimizer, self.ema)
        return {
            "unet": parts["weights"],  # the name that it has had since 0.1
            "ema": parts["ema"],
            "optimizer": parts["optimizer"],
            "scaler": ScalerState(self.strategy.scaler),
            "meter": self.meter,
        }


def assemble(
    trainable: Trainable,
    strategy: Strategy,
    *,
    optimizer: Callable[..., Any],
    lr: Callable[..., float],
    ema: Callable[..., Ema],
    meter: Meter,
    steps: int,
    max_grad_norm: float = 1.0,
    batch_size: int = 1,
    grad_accum: int = 1,
    free: Sequence[dict[str, Any]] = (),
    in_backward: bool = False,
) -> State:
    """The state before step 0, for a run of `steps` steps.

    optimizer, ema: called with `params` and `parameters`. lr: step, steps -> factor of the optimizer's rate.
    batch_size, grad_accum: what one process accumulates a step of. free: further parameter groups, such as a learned
    weighting's, which are neither clipped nor averaged over time. in_backward: update each block within the backward
    pass (memory=[optimizer_in_backward]).

    The trainable's parameters become those that the strategy has made of them: this rank's rows, if it shards.
    """
    learned = [parameter for group in free for parameter in group["params"]]

    def make(parameters: Parameters) -> Any:
        trainable.parameters = parameters
        inner = optimizer(params=[*trainable.groups, *free])
        keep_layout(inner)
        return inner

    settings = StepSettings(batch_size, grad_accum, max_grad_norm)
    wrapped = strategy.wrap(trainable.module, trainable.parameters, None if in_backward else make, settings)
    trainable.parameters = wrapped.parameters
    stepped, update = wrapped.optimizer, wrapped.update
    if update is None:
        if any(group.keys() != {"params"} for group in trainable.groups):
            raise UserError(
                "memory: optimizer_in_backward knows one rate for all of a network, and this adapter asks for several; "
                "set '~memory.optimizer_in_backward'"
            )
        stepped = update = UpdateInBackward(optimizer, trainable.parameters, max_grad_norm, free)
    return State(
        strategy=strategy,
        trainable=trainable,
        module=wrapped.module,
        learned=learned,
        optimizer=stepped,
        update=update,
        lr=LearningRate(stepped, lr, steps),
        ema=strategy.keep(ema, trainable.parameters),
        meter=meter,
        remarks=wrapped.remarks,
    )


class ScalerState:
    """The fp16 loss scaler as a Stateful; empty for other precisions."""

    def __init__(self, scaler: Any):
        self.scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return dict(self.scaler.state_dict()) if self.scaler else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler:
            self.scaler.load_state_dict(state)
