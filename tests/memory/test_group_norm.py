"""The NHWC GroupNorm against float64. Triton's interpreter runs the kernels on the CPU, in a process of its own: it
must be asked for before anything imports triton.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nai_xl.memory.group_norm import NHWC, group_norm

# B, C, h, w, groups: one tile; ragged rows and columns; several tiles; as in SDXL, 30 channels to a group
SHAPES = [(1, 32, 8, 8, 32), (2, 48, 9, 15, 16), (2, 96, 10, 14, 4), (1, 960, 2, 3, 32)]
KINDS = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # largest error against float64, relative to the largest value


def case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, shift: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and a gradient; x is `shift` deviations away from 0."""
    batch, channels, height, width, _ = shape
    random = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, channels, height, width, generator=random) + shift
    weight, bias = 1 + torch.randn(2, channels, generator=random) / 2
    gradient = torch.randn(x.shape, generator=random)
    return x.to(dtype, memory_format=NHWC), weight, bias, gradient.to(dtype, memory_format=NHWC)


def worst(function: Any, tensors: tuple[Tensor, ...], groups: int, silu: bool) -> dict[str, float]:
    """Error of the output and of every gradient against float64, relative to its largest value."""
    *inputs, gradient = tensors
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in inputs]
    found = [out := function(*leaves, groups, 1e-5, silu), *torch.autograd.grad(out, leaves, gradient)]
    assert out.is_contiguous(memory_format=NHWC) and out.dtype == inputs[0].dtype
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    normed = F.group_norm(exact[0], groups, *exact[1:], 1e-5)
    y = F.silu(normed) if silu else normed
    expected = [y, *torch.autograd.grad(y, exact, gradient.double())]
    errors = [(f.double() - e).abs().max().item() / e.abs().max().item() for f, e in zip(found, expected, strict=True)]
    return dict(zip(("y", "dx", "dweight", "dbias"), errors, strict=True))


def plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    return group_norm(x, groups, weight, bias, eps, silu=silu)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_triton_it_is_torchs_own_in_nhwc(shape: tuple[int, int, int, int, int], silu: bool) -> None:
    errors = worst(plain, case(shape, torch.float32, 0.0), shape[-1], silu)
    assert max(errors.values()) <= ROUNDING[torch.float32], errors


def test_another_memory_order_is_kept_too() -> None:
    x, weight, bias, _ = case(SHAPES[1], torch.float32, 0.0)
    assert group_norm(x.contiguous(), 16, weight, bias, 1e-5, silu=True).is_contiguous()


def test_kernels_agree_with_float64() -> None:
    """Far from 0 too, where E[x^2] - E[x]^2 would lose 1e-3 of the variance."""
    pytest.importorskip("triton", reason="the kernels need triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, Path(__file__)], env=env, capture_output=True, text=True, check=True)
    cases = json.loads(done.stdout.splitlines()[-1])
    assert len(cases) == 3 * len(SHAPES) + 1
    for name, errors in cases.items():
        # 100 deviations from 0 float32 knows x to 1e-5 of a deviation
        limit = 1e-4 if "far" in name else ROUNDING[torch.bfloat16 if "bfloat16" in name else torch.float32]
        assert max(errors.values()) <= limit, (name, errors)


if __name__ == "__main__":
    from nai_xl.memory.group_norm_triton import GroupNormSilu

    report = {
        f"{shape} {dtype} {silu}": worst(GroupNormSilu.apply, case(shape, dtype, 0.0), shape[-1], silu)
        for shape, (dtype, silu) in itertools.product(SHAPES, KINDS)
    }
    report["far"] = worst(GroupNormSilu.apply, case(SHAPES[2], torch.float32, 100.0), 4, True)
    print(json.dumps(report))
