"""Blocks computed twice give torch's own gradients, and the second time leave out what no gradient reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nai_xl.memory.recompute import can_be_unread, recomputed, unread


def gradients(y: Tensor, *of: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(y, of, torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    )


@given(kernel=st.sampled_from([1, 3, 5]), bias=st.booleans(), groups=st.sampled_from([1, 2]), nhwc=st.booleans())
def test_a_convolution_that_nobody_reads_has_its_gradients(kernel: int, bias: bool, groups: int, nhwc: bool) -> None:
    layer = nn.Conv2d(4, 6, kernel, padding=kernel // 2, bias=bias, groups=groups)
    x = torch.randn(2, 4, 7, 5, requires_grad=True)
    given_x = x.contiguous(memory_format=torch.channels_last) if nhwc else x
    assert can_be_unread(layer)
    expected = gradients(layer(given_x), x, *layer.parameters())
    with unread([layer]):
        value = layer(given_x)
    assert value.shape == layer(given_x).shape and not value.any()
    for found, gradient in zip(gradients(value, x, *layer.parameters()), expected, strict=True):
        assert torch.equal(found, gradient)


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), bias=st.booleans(), bf16=st.booleans())
def test_a_linear_layer_that_nobody_reads_has_its_gradients(shape: list[int], bias: bool, bf16: bool) -> None:
    layer, x = nn.Linear(8, 3, bias=bias), torch.randn(*shape, 8, requires_grad=True)
    assert can_be_unread(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = layer(x)
        with unread([layer]):
            value = layer(x)
    assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
    leaves = [x, *layer.parameters()]
    for found, gradient in zip(gradients(value, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def test_layers_are_themselves_again_afterwards() -> None:
    layer = nn.Linear(3, 3)
    before = vars(layer).keys()
    with pytest.raises(KeyError), unread([layer]):
        raise KeyError
    assert vars(layer).keys() == before
    assert layer(torch.ones(1, 3)).any()


def watched(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def wrapped(layer: nn.Module) -> nn.Module:
    layer.forward = layer.forward  # as accelerate's hooks do
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Sequential(nn.Linear(4, 4)),
        type("Float8Linear", (nn.Linear,), {})(4, 4),
        watched(nn.Linear(4, 4)),
        wrapped(nn.Linear(4, 4)),
        None,
    ],
)
def test_other_layers_are_computed(layer: Any) -> None:
    assert not can_be_unread(layer)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: float, more: Tensor | None) -> Tensor:
        inner = torch.tanh(self.first(x)) * scale
        return x + self.last(inner if more is None else inner + more)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("more", [None, torch.linspace(-1, 1, 16)])
def test_a_block_has_the_gradients_that_it_has_without(
    bf16: bool, frozen: bool, inside: bool, more: Tensor | None
) -> None:
    """Training calls the backward pass outside of autocast; inside, casts without a graph must not be used again."""
    block = Residual()
    block.first.weight.requires_grad_(not frozen)
    x = torch.randn(3, 5, 8)

    def step(again: bool) -> list[Tensor | None]:
        leaf = x.clone().requires_grad_()
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            inputs = (leaf * 2, 0.5, more)
            y = recomputed(block, [block.last], *inputs) if again else block(*inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside and bf16):
            y.float().square().mean().backward()
        return [leaf.grad, *(p.grad for p in block.parameters())]

    for found, expected in zip(step(True), step(False), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_arguments_alone_are_kept_and_the_end_is_not_computed_again() -> None:
    block, x = Residual(), torch.randn(3, 8, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = recomputed(block, [block.last], x, 1.0, None)
    assert [t.shape for t in kept] == [x.shape]
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    gemm = 2 * 3 * 8 * 16
    assert counter.get_total_flops() == gemm + 2 * 2 * gemm  # the first layer again, and the gradients of both


def test_gradients_by_another_way_are_refused() -> None:
    block, x = Residual(), torch.randn(3, 8, requires_grad=True)
    y = recomputed(block, [], x, 1.0, None)
    with pytest.raises(RuntimeError, match=r"Tensor.backward\(\) only"):
        torch.autograd.grad(y.sum(), x)
