"""From what was built to what the loop steps: the wrapped network, its optimizer, the update, the rate, the average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nai_xl.adapter.trainable import Trainable
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.meter import Meter
from nai_xl.errors import UserError
from nai_xl.interfaces import Ema, Stateful
from nai_xl.optimizer.ema import NoEma
from nai_xl.optimizer.lr import LearningRate
from nai_xl.optimizer.stochastic import keep_layout
from nai_xl.optimizer.update import Update, UpdateInBackward, WholeUpdate


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

    def averages(self) -> Mapping[str, Tensor]:
        """Collective. The averaged weights by name: all of them on the first rank."""
        return self.strategy.full(self.ema.averages())

    def stateful(self) -> dict[str, Stateful]:
        """The parts that a checkpoint saves, by name."""
        return {
            "unet": Weights(self.trainable.parameters, self.strategy),  # the name that it has had since 0.1
            "ema": self.ema,
            "optimizer": self.optimizer,
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
    free: Sequence[dict[str, Any]] = (),
    in_backward: bool = False,
) -> State:
    """The state before step 0, for a run of `steps` steps.

    optimizer, ema: called with `params` and `parameters`. lr: step, steps -> factor of the optimizer's rate. free:
    further parameter groups, such as a learned weighting's, which are neither clipped nor averaged over time.
    in_backward: update each block within the backward pass (memory=[optimizer_in_backward]).
    """
    update: Update
    if in_backward:
        if any(group.keys() != {"params"} for group in trainable.groups):
            raise UserError(
                "memory: optimizer_in_backward knows one rate for all of a network, and this adapter asks for several; "
                "set '~memory.optimizer_in_backward'"
            )
        module, _ = strategy.wrap(trainable.module)
        stepped = update = UpdateInBackward(optimizer, trainable.parameters, max_grad_norm, free)
    else:
        inner = optimizer(params=[*trainable.groups, *free])
        keep_layout(inner)
        module, stepped = strategy.wrap(trainable.module, inner)
        update = WholeUpdate(strategy, stepped, inner, trainable.parameters.values(), max_grad_norm)
    kept = strategy.kept(trainable.parameters)
    return State(
        strategy=strategy,
        trainable=trainable,
        module=module,
        learned=[parameter for group in free for parameter in group["params"]],
        optimizer=stepped,
        update=update,
        lr=LearningRate(stepped, lr, steps),
        ema=ema(parameters=kept) if kept else NoEma(parameters={}),
        meter=meter,
    )


@dataclass
class Weights:
    """The parameters that are trained, by name, as a Stateful."""

    parameters: Mapping[str, nn.Parameter]
    strategy: Strategy

    def state_dict(self) -> dict[str, Any]:
        """Collective: whole on the first rank."""
        return dict(self.strategy.full({name: p.detach() for name, p in self.parameters.items()}))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError when names or shapes differ: a network must not be continued in part."""
        if _shapes(state) != _shapes(self.parameters):
            raise UserError(
                "the run's checkpoint holds the weights of another model or adapter; set name=NAME to begin a new run"
            )
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class ScalerState:
    """The fp16 loss scaler as a Stateful; empty for other precisions."""

    def __init__(self, scaler: Any):
        self.scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return dict(self.scaler.state_dict()) if self.scaler else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler:
            self.scaler.load_state_dict(state)
