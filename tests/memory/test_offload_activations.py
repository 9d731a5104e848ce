"""What goes to the host and back, and what stays."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nai_xl.memory import offload_activations
from nai_xl.memory.action import MemoryAction
from nai_xl.memory.attention import Sdpa
from nai_xl.memory.channels_last import ChannelsLast
from nai_xl.memory.gradient_checkpointing import GradientCheckpointing
from nai_xl.memory.offload_activations import OffloadActivations
from tests.memory.counted import unet_with
from tests.memory.test_memory import loss_of


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that goes to the host; the CPU is taken for a device with memory of its own."""
    seen: list[Tensor] = []
    monkeypatch.setattr(offload_activations, "stays", lambda device: False)
    real = offload_activations.park
    monkeypatch.setattr(offload_activations, "park", lambda tensor: (seen.append(tensor), real(tensor))[1])
    return seen


@pytest.mark.parametrize("more", [[], [GradientCheckpointing("all")], [ChannelsLast()]])
def test_offloaded_activations_give_the_same_gradients(more: list[MemoryAction], parked: list[Tensor]) -> None:
    min_bytes = 4096
    unet, expected = unet_with(Sdpa(), *more, OffloadActivations(min_bytes)), unet_with(Sdpa(), *more)
    for model in (unet, expected):
        loss_of(model).backward()
    for found, other in zip(unet.parameters(), expected.parameters(), strict=True):
        # half of a gated layer comes back without the gaps that it had, and vector loops end elsewhere
        assert (found.grad - other.grad).norm() <= 1e-5 * (other.grad.norm() + 1e-3)
    assert len(parked) > 10 and min(tensor.nbytes for tensor in parked) >= min_bytes


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_are_not_offloaded(autocast: bool, parked: list[Tensor]) -> None:
    """Nor the half-precision copies of them that autocast makes, as large together as the model."""
    unet = unet_with(Sdpa(), OffloadActivations(1))
    storages = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    shapes = {tuple(sorted(parameter.shape)) for parameter in unet.parameters() if parameter.ndim == 4}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(unet)
    loss.backward()
    assert parked and not storages & {tensor.untyped_storage().data_ptr() for tensor in parked}
    assert not shapes & {tuple(sorted(tensor.shape)) for tensor in parked}


def test_what_is_small_stays_and_so_does_everything_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    went: list[Tensor] = []
    monkeypatch.setattr(offload_activations, "park", went.append)
    loss_of(unet_with(OffloadActivations(1))).backward()
    monkeypatch.setattr(offload_activations, "stays", lambda device: False)
    loss_of(unet_with(OffloadActivations(1 << 40))).backward()
    assert went == []


def test_hooks_are_closed_when_a_forward_pass_fails(parked: list[Tensor]) -> None:
    unet = unet_with(OffloadActivations(1))
    with pytest.raises((AttributeError, TypeError, ValueError, RuntimeError)):
        unet(torch.zeros(1, 4, 8, 8), 1, None)
    parked.clear()
    (torch.ones(8, requires_grad=True) ** 2).sum().backward()
    assert parked == []


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_parked_tensor_comes_back_with_its_strides(shape: list[int], order: Any, dtype: torch.dtype) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    tensor = torch.randn(shape).to(dtype).permute(axes)
    back = offload_activations.unpack(offload_activations.park(tensor))
    assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.data_ptr() != tensor.data_ptr()
