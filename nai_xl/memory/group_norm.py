"""GroupNorm (1803.08494) and SiLU in one operation that keeps channels_last order."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

NHWC = torch.channels_last
TRITON = importlib.util.find_spec("triton") is not None  # torch's CUDA wheels bring it, the CPU's do not


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool) -> Tensor:
    """y [B,C,h,w], x's memory order: (x - mean) / sqrt(variance + eps) by group, times weight plus bias, [C] both.

    A compiler fuses torch's own operations and keeps their order, and so does torch on a CPU. Eager torch on CUDA
    reads and writes NCHW and, under autocast, float32; there one kernel takes and gives what x is.
    """
    if TRITON and x.is_cuda and not torch.compiler.is_compiling():
        from nai_xl.memory.group_norm_triton import GroupNormSilu

        return GroupNormSilu.apply(x, weight, bias, groups, eps, silu)
    normed = F.group_norm(x, groups, weight, bias, eps)
    activated = F.silu(normed) if silu else normed
    return activated.contiguous(memory_format=NHWC) if x.is_contiguous(memory_format=NHWC) else activated
