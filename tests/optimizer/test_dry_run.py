"""In a dry run Triton's kernels allocate what they would and compute nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nai_xl.memory.group_norm import NHWC, group_norm
from nai_xl.optimizer import dry_run
from nai_xl.optimizer.adamw8bit import AdamW8bit
from nai_xl.optimizer.adamw_bf16 import AdamWBf16
from nai_xl.plan.live_bytes import LiveBytes


@pytest.mark.parametrize("make", [AdamWBf16, AdamW8bit])
@pytest.mark.parametrize("size", [64, 8192])
def test_an_update_in_one_kernel_takes_no_memory_of_its_own(make: Any, size: int) -> None:
    def peak() -> int:
        with LiveBytes(block=1) as live:
            optimizer.step()
        return live.peak

    parameter = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter], lr=0.1)
    optimizer.step()
    before = parameter.detach().clone()
    with dry_run.of_a_gpu():
        assert peak() < 200  # the step's number and its key
    assert parameter.equal(before)
    assert peak() > 2 * size and not parameter.equal(before)


def test_it_ends_with_its_block() -> None:
    with pytest.raises(RuntimeError, match="mishap"), dry_run.of_a_gpu():
        assert dry_run.active()
        raise RuntimeError("mishap")
    assert not dry_run.active()


def test_a_norm_keeps_what_the_kernel_keeps_and_gives_what_it_gets() -> None:
    kept: list[Tensor] = []
    x = torch.randn(2, 32, 6, 10).to(torch.bfloat16, memory_format=NHWC).requires_grad_()
    weight, bias = nn.Parameter(torch.ones(32)), nn.Parameter(torch.zeros(32))
    with dry_run.of_a_gpu(), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = group_norm(x, 8, weight, bias, 1e-5, silu=True)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert sum(t.nbytes for t in kept) == x.nbytes + weight.nbytes + bias.nbytes + 2 * (2 * 8) * 4
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape and weight.grad is not None
