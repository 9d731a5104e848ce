"""adapter=full: every parameter of the network is trained."""

from __future__ import annotations

from torch import nn

from nai_xl.adapter.trainable import Trainable


def full(module: nn.Module) -> Trainable:
    """All of `module`: full fine-tuning."""
    return Trainable(module, dict(module.named_parameters()))
