"""How much of a compiled block is kept for the backward pass."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from nai_xl.errors import UserError
from nai_xl.memory import process_wide
from nai_xl.memory.action import MemoryAction


@dataclass(frozen=True)
class ActivationBudget(MemoryAction):
    """Compiled blocks keep `budget` of the activations that they would, and recompute the cheapest operations.

    torch chooses them by their FLOPs as a 0-1 knapsack: at 0.5 a block of SDXL recomputes norms, activations and sums
    but no matrix product and no convolution. On the CPU it also recomputes attention, whose kernel there torch takes to
    be free. 1 keeps what makes the backward pass fastest, 0 the blocks' inputs alone. See torch's "Current and New
    Activation Checkpointing Techniques in PyTorch" (2025) and torch/_functorch/config.py.
    """

    budget: Annotated[float, Field(ge=0, le=1)] = 0.5

    tolerance = 1e-4  # recomputed values may be fused, and so rounded, in another way

    @property
    def activation_budget(self) -> float:
        return self.budget

    def apply(self, model: Any) -> None:
        # read when a block is compiled, that is at its first call, whichever of the two actions comes first
        process_wide.change(importlib.import_module("torch._functorch.config"), "activation_memory_budget", self.budget)

    def refuse_beside(self, actions: Sequence[MemoryAction], optimizer: Callable[..., Any], precision: str) -> None:
        if not any(action.compiles for action in actions):
            raise UserError(
                "memory=activation_budget acts on compiled blocks only; set 'memory=[...,compile]', or "
                "'~memory.activation_budget'"
            )
