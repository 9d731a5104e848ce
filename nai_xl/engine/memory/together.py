"""Which memory actions need another one, or an optimizer that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nai_xl.engine.memory.compiled import ActivationBudget, Compile
from nai_xl.engine.memory.precision import Bf16Weights
from nai_xl.engine.optimizers.rounding import rounds_stochastically
from nai_xl.errors import UserError


def refuse_misfits(actions: Sequence[object], optimizer: Callable[..., Any], mixed_precision: str) -> None:
    """Raises UserError, naming the override, for actions that would do nothing or harm with these other choices.

    `optimizer` is the class, or a partial of it, before it is given parameters.
    """

    def chosen(kind: type) -> bool:
        return any(isinstance(action, kind) for action in actions)

    if chosen(ActivationBudget) and not chosen(Compile):
        raise UserError("memory=activation_budget acts on compiled blocks only; set 'memory=[...,compile]'")
    if chosen(Bf16Weights):
        if mixed_precision != "no":
            raise UserError(
                f"memory=bf16_weights computes in bfloat16 without run.mixed_precision={mixed_precision}; "
                "set run.mixed_precision=no"
            )
        if not rounds_stochastically(optimizer):
            raise UserError(
                "memory=bf16_weights needs an optimizer that rounds stochastically: rounding to nearest would drop "
                "every update below 1/256 of its weight. Set optimizer=adamw_bf16."
            )
