"""GroupNorm (1803.08494) and SiLU in one operation that keeps channels_last order."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nai_xl.optimizer import dry_run

NHWC = torch.channels_last
TRITON = importlib.util.find_spec("triton") is not None  # torch's CUDA wheels bring it, the CPU's do not


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool) -> Tensor:
    """y [B,C,h,w], x's memory order: (x - mean) / sqrt(variance + eps) by group, times weight plus bias, [C] both.

    A compiler fuses torch's own operations and keeps their order, and so does torch on a CPU. Eager torch on CUDA
    reads and writes NCHW and, under autocast, float32; there one kernel takes and gives what x is.
    """
    if not torch.compiler.is_compiling():
        if dry_run.active():
            return DryGroupNorm.apply(x, weight, bias, groups)
        if TRITON and x.is_cuda:
            from nai_xl.memory.group_norm_triton import GroupNormSilu

            return GroupNormSilu.apply(x, weight, bias, groups, eps, silu)
    normed = F.group_norm(x, groups, weight, bias, eps)
    activated = F.silu(normed) if silu else normed
    return activated.contiguous(memory_format=NHWC) if x.is_contiguous(memory_format=NHWC) else activated


class DryGroupNorm(torch.autograd.Function):
    """What group_norm_triton.GroupNormSilu costs in memory: it keeps x and two numbers per group, and returns x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias, x.new_empty((2, len(x), groups), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), None
