"""adapter=full: every parameter of the network is trained."""

from __future__ import annotations

from torch import nn

from nai_xl.adapter.trainable import Trainable


def full(module: nn.Module) -> Trainable:
    """All of `module` but what its task has frozen: full fine-tuning."""
    return Trainable(module, {name: p for name, p in module.named_parameters() if p.requires_grad})
