"""What must be true of all chosen memory actions together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nai_xl.errors import UserError
from nai_xl.interfaces import Precision
from nai_xl.memory.action import MemoryAction


def refuse_misfits(actions: Sequence[MemoryAction], optimizer: Callable[..., Any], precision: Precision) -> None:
    """Raises UserError, naming the override, for actions that would do nothing or harm with these other choices.

    optimizer: the class, or a partial of it, before it is given parameters.
    """
    _refuse_two_attentions(actions)
    for action in actions:
        action.refuse_beside(actions, optimizer, precision)


def _refuse_two_attentions(actions: Sequence[MemoryAction]) -> None:
    """The last would silently win."""
    chosen = [action.attention for action in actions if action.attention is not None]
    if len(chosen) > 1:
        raise UserError(
            f"memory=[{','.join(chosen)}]: only one can compute attention; '~memory.{chosen[0]}' takes one out"
        )


def autocast(actions: Sequence[MemoryAction], precision: Precision) -> Precision:
    """The autocast precision: "no" if an action sets the type of the weights, in which all is then computed."""
    return "no" if any(action.weights_in is not None for action in actions) else precision
