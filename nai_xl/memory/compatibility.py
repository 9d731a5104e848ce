"""Which memory actions need another one, or an optimizer that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nai_xl.errors import UserError
from nai_xl.interfaces import Precision
from nai_xl.memory.attention import HALF_PRECISION, Sdpa, refuse_two_attentions
from nai_xl.memory.compiled import ActivationBudget, Compile
from nai_xl.memory.fewer_bits import Bf16Weights
from nai_xl.optimizer.rounding import rounds_stochastically


def refuse_misfits(actions: Sequence[object], optimizer: Callable[..., Any], mixed_precision: str) -> None:
    """Raises UserError, naming the override, for actions that would do nothing or harm with these other choices.

    `optimizer` is the class, or a partial of it, before it is given parameters.
    """

    def chosen(kind: type) -> bool:
        return any(isinstance(action, kind) for action in actions)

    refuse_two_attentions(actions)
    if chosen(ActivationBudget) and not chosen(Compile):
        raise UserError("memory=activation_budget acts on compiled blocks only; set 'memory=[...,compile]'")
    if chosen(Bf16Weights):
        if mixed_precision == "fp16":
            raise UserError("memory=bf16_weights computes in bfloat16; set precision=bf16, or no")
        if not rounds_stochastically(optimizer):
            raise UserError(
                "memory=bf16_weights needs an optimizer that rounds stochastically: rounding to nearest would drop "
                "every update below 1/256 of its weight. Set optimizer=adamw_bf16, adamw8bit or adafactor."
            )
    elif mixed_precision == "no" and torch.cuda.is_available():
        for action in actions:
            if isinstance(action, Sdpa) and action.kernel in HALF_PRECISION:
                half = f"memory=[{action.kernel}] computes in half precision"
                raise UserError(f"{half}; set precision=bf16, or memory=[sdpa]")


def autocast(actions: Sequence[object], mixed_precision: Precision) -> Precision:
    """What accelerate is to cast to: nothing where the weights are bfloat16 and so everything is already."""
    return "no" if any(isinstance(action, Bf16Weights) for action in actions) else mixed_precision
