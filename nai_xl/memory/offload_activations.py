"""Activations wait for the backward pass in the computer's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nai_xl.memory.action import MemoryAction


class Parked(NamedTuple):
    """A saved tensor's copy on the host, in the tensor's own memory order, and where it belongs."""

    host: Tensor
    device: torch.device


Saved = Tensor | Parked


@dataclass(frozen=True)
class OffloadActivations(MemoryAction):
    """Saved tensors of at least `min_bytes` go to pinned host memory and come back in the backward pass.

    Weights stay where they are. The idea is torch.autograd.graph.save_on_cpu's; this one keeps channels_last order, and
    copies without making the host wait. Copies queue behind the computation on its own stream. On a CPU nothing moves.
    """

    min_bytes: Annotated[int, Field(ge=1)] = 1 << 20
    tolerance = 0.0  # bytes go and come back
    changes_weights = False

    def apply(self, model: Any) -> None:
        parking = Parking(self.min_bytes)
        model.register_forward_pre_hook(parking.open)
        model.register_forward_hook(parking.close, always_call=True)


class Parking:
    """Holds the hooks open while the model runs forward."""

    def __init__(self, min_bytes: int):
        self.min_bytes = min_bytes
        self.hooks: list[saved_tensors_hooks] = []

    def open(self, *_: Any) -> None:
        self.hooks.append(saved_tensors_hooks(self.pack, unpack))
        self.hooks[-1].__enter__()

    def close(self, *_: Any) -> None:
        if self.hooks:  # a forward pass that failed before `open` closes nothing
            self.hooks.pop().__exit__()

    def pack(self, tensor: Tensor) -> Saved:
        return tensor if tensor.nbytes < self.min_bytes or stays(tensor.device) or is_weight(tensor) else park(tensor)


def is_weight(tensor: Tensor) -> bool:
    """Whether a saved tensor is a parameter, or a view or autocast's copy of one: a function of a single leaf."""
    node = tensor.grad_fn
    if node is None:
        return isinstance(tensor._base if tensor._is_view() else tensor, nn.Parameter)
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def stays(device: torch.device) -> bool:
    """Whether a device's memory is the host's, so that there is nowhere to go."""
    return device.type == "cpu"


def park(tensor: Tensor) -> Parked:
    """The caching allocator hands the tensor's memory on in stream order only, so the copy may still be under way."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return Parked(host.copy_(tensor, non_blocking=True), tensor.device)


def unpack(saved: Saved) -> Tensor:
    return saved.host.to(saved.device, non_blocking=True) if isinstance(saved, Parked) else saved
