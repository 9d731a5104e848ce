"""The trained weights as a part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from nai_xl.errors import UserError


@dataclass
class Weights:
    """The parameters that are trained, by name, as a Stateful."""

    parameters: Mapping[str, nn.Parameter]

    def state_dict(self) -> dict[str, Any]:
        return {name: p.detach() for name, p in self.parameters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError when names or shapes differ: a network must not be continued in part."""
        refuse_others(state, self.parameters)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])


class Shaped(Protocol):
    @property
    def shape(self) -> Any: ...


def refuse_others(saved: Mapping[str, Shaped], own: Mapping[str, Shaped]) -> None:
    """Raise UserError when names or shapes differ."""
    if shapes(saved) != shapes(own):
        raise UserError(
            "the run's checkpoint holds the weights of another model or adapter; set name=NAME to begin a new run"
        )


def shapes(tensors: Mapping[str, Shaped]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
