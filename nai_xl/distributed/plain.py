"""A network's structure without its weights, from which an engine that replaces parameters gives back a plain one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def structure_of(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have no storage."""

    def empty(tensor: Tensor) -> Tensor:
        shape = torch.empty_like(tensor, device="meta")
        return nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape

    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): empty(tensor) for tensor in tensors})


def row_major(module: nn.Module) -> None:
    """Store parameters in plain order, since engines cut them. Convolutions may still compute in NHWC."""
    for p in module.parameters():
        if p.stride() != torch.empty(p.shape, device="meta").stride():  # 1 x 1 kernels count as both orders
            p.data = p.data.clone(memory_format=torch.contiguous_format)


def become(module: nn.Module, other: nn.Module) -> None:
    """Make `module` what `other` is, for all who refer to it."""
    module.__class__ = type(other)
    module.__dict__ = other.__dict__
