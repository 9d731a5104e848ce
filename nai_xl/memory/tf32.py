"""TensorFloat-32: float32 products of fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nai_xl.memory import process_wide
from nai_xl.memory.action import MemoryAction


@dataclass(frozen=True)
class Tf32(MemoryAction):
    """float32 matrix products and convolutions on a GPU with 10 bits of mantissa, several times as fast.

    NVIDIA A100 white paper (2020), TensorFloat-32; Ampere and newer, and without effect elsewhere. It matters for
    precision=fp32: autocast leaves hardly any float32 product.
    """

    tolerance = 5e-3  # each factor is rounded by up to 2^-11

    def apply(self, model: Any) -> None:
        process_wide.change(torch.backends.cuda.matmul, "allow_tf32", True)
        process_wide.change(torch.backends.cudnn, "allow_tf32", True)
