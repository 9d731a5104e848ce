"""float8 matrix products in the feed-forward layers."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nai_xl.errors import UserError
from nai_xl.memory.action import MemoryAction

FP8_CAPABILITY = (8, 9)  # Ada Lovelace; torch._scaled_mm has no older kernels


@dataclass(frozen=True)
class Fp8FeedForward(MemoryAction):
    """float8 matrix products in the feed-forward layers, forward and backward, with one scale per tensor and call.

    Micikevicius et al., FP8 Formats for Deep Learning, 2209.05433, by torchao.float8 (e4m3 for weights and activations,
    e5m2 for gradients). Weights stay in their own precision and keep their names. It saves time, not memory, and only
    when compiled. `emulate` computes the same rounding in wider formats, to try it where there are no such kernels.

    Raises UserError when it is built without torchao or, unless emulated, without a GPU of compute capability 8.9.
    """

    emulate: bool = False

    replaces_products = True
    unets_only = True  # an autoencoder has no feed-forward layers
    tolerance = 2e-2  # 3 bits of mantissa round each factor by up to 2^-4; sums average that out

    def __post_init__(self) -> None:
        if importlib.util.find_spec("torchao") is None:
            raise UserError("memory.fp8_ff needs torchao; pip install torchao, or set '~memory.fp8_ff'")
        if not self.emulate and not (torch.cuda.is_available() and _capability() >= FP8_CAPABILITY):
            raise UserError(
                "memory.fp8_ff needs a GPU of compute capability 8.9 or newer (RTX 4090, L40, H100); set "
                "'~memory.fp8_ff', or memory.fp8_ff.emulate=true to try its rounding without its speed"
            )

    def apply(self, model: Any) -> None:
        float8 = importlib.import_module("torchao.float8")  # an optional dependency, slow to import

        def in_feed_forward(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and ".ff." in name

        settings = float8.Float8LinearConfig(emulate=self.emulate, pad_inner_dim=True)  # tokens x batch may be odd
        float8.convert_to_float8_training(model, module_filter_fn=in_feed_forward, config=settings)


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()
