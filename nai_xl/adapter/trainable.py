"""What is trained: the parameters that move, and what becomes of them when the run is finished.

The optimizer, the averages, the checkpoint, the memory actions and the export see a Trainable and nothing else, so that
a part of a model, or weights added to one, is trained by the same loop as all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Trainable:
    """module: what the loss calls. parameters: name -> what moves, in the optimizer's order; the rest is frozen."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return [{"params": list(self.parameters.values())}]

    def deliver(self, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's whole state, `averages` in place of what was trained.

        Raises ValueError unless `averages` are of just these parameters: weights that were not trained would be
        delivered as if they were.
        """
        if averages.keys() != self.parameters.keys():
            odd = sorted(averages.keys() ^ self.parameters.keys())
            raise ValueError(f"{len(odd)} weights of the average do not belong to what was trained, such as {odd[0]}")
        return {**self.module.state_dict(), **averages}


Adapter = Callable[[nn.Module], Trainable]
"""An option of the group `adapter`: a model's network -> what is trained of it.

It may change the network in place. Names of weights stay what they are, unless its Trainable
overrides `deliver`.
"""
