"""Sample weights: how much the loss of each image counts."""

from __future__ import annotations

import torch
from torch import Tensor

from nai_xl.data.index import Index


def equal(index: Index) -> Tensor:
    """[N] float32, 1 for every image."""
    return torch.ones(len(index.items))
