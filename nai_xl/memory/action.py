"""What every option of the group `memory` is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch


class MemoryAction:
    """Changes how much memory or time a step takes. What is learned changes by rounding at most.

    An action is built before any weight is read, and raises UserError if this machine cannot run it. Whoever must know
    how an action behaves asks the members below. None is recognised by its class or its name.
    """

    tolerance: ClassVar[float]
    """The largest relative change of a step's loss that the action may cause. Every action states its own: 0 if it
    computes the same numbers in the same order, about 1e-5 for sums of float32 in another order, 1e-2 for arithmetic in
    half precision.
    """

    changes_weights: ClassVar[bool] = True
    """Whether a run with the action is another run than one without. False where the trained weights differ by no more
    than the last bits: such an action can be added to a run that is continued, and taken away from it.
    """

    compiles: ClassVar[bool] = False
    """Whether the model compiles in its first call of every shape, which therefore comes before the clock starts."""

    updates_in_backward: ClassVar[bool] = False
    """Whether the optimizer updates each block within the backward pass, and no gradient outlives it."""

    replaces_products: ClassVar[bool] = False
    """Whether the action exchanges layers for some with other matrix products, which keep scales of their own."""

    weights_in: ClassVar[torch.dtype | None] = None
    """The type that the action gives the weights; None leaves them as they are."""

    @property
    def unets_only(self) -> bool:
        """Whether the action suits a UNet's call, layers or attention, and so no other network's."""
        return False

    @property
    def attention(self) -> str | None:
        """The option's name if the action decides how attention is computed, as only one can."""
        return None

    @property
    def activation_budget(self) -> float | None:
        """The share of their activations that compiled blocks may keep; None sets no limit."""
        return None

    @property
    def key(self) -> str:
        """The option's name in messages, as in '~memory.KEY': the module that the class is in."""
        return type(self).__module__.rpartition(".")[2]

    def apply(self, model: Any) -> None:
        """Change the network, a diffusers model, in place, before the strategy wraps it.

        No parameter is renamed or replaced.
        """
        raise NotImplementedError

    def refuse_beside(self, actions: Sequence[MemoryAction], optimizer: Callable[..., Any], precision: str) -> None:
        """Raise UserError, naming the override, if the action would do nothing, or harm, beside these choices.

        actions: all that are chosen, this one included. optimizer: the class or a partial of it, not yet given
        parameters. precision: no | bf16 | fp16.
        """

    def refuse(self, *, grad_accum: int, precision: str, world: int) -> None:
        """Raise UserError, naming the override, if a run that trains so on `world` processes cannot have it."""
