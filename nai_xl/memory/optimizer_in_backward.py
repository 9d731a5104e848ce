"""Each block is updated as soon as its gradient is complete, within the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nai_xl.errors import UserError
from nai_xl.memory.action import MemoryAction


@dataclass(frozen=True)
class OptimizerInBackward(MemoryAction):
    """Update each block within the backward pass, so that gradients never lie in memory all at once.

    This memory action leaves the model as it is and makes UpdateInBackward the loop's update; that class says what
    becomes of clipping. The result is the usual update's while the gradient's norm stays within run.max_grad_norm.
    """

    tolerance = 1e-4
    updates_in_backward = True

    def apply(self, model: Any) -> None:
        pass

    def refuse(self, *, grad_accum: int, precision: str, world: int) -> None:
        """Raises UserError where a gradient must outlive the backward pass that made it."""
        without = "'~memory.optimizer_in_backward'"
        if grad_accum > 1:
            raise UserError(
                f"memory: optimizer_in_backward cannot accumulate gradients; set run.grad_accum=1 or {without}"
            )
        if precision == "fp16":
            raise UserError(
                f"memory: optimizer_in_backward does without a loss scaler; set precision=bf16 or {without}"
            )
        if world > 1:
            raise UserError(
                f"memory: optimizer_in_backward leaves nothing to average over {world} processes; set {without}"
            )
