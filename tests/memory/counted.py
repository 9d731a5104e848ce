"""The tiny UNet with actions, and what a step of it keeps and costs, as exact counts."""

import functools

from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from nai_xl.memory.action import MemoryAction
from nai_xl.memory.attention import Sdpa
from tests.memory.test_memory import loss_of, plain_unet


def unet_with(*actions: MemoryAction) -> UNet2DConditionModel:
    unet = plain_unet()
    for action in actions:
        action.apply(unet)
    return unet


def saved_bytes(*actions: MemoryAction) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights left out and shared memory counted once."""
    unet = unet_with(*actions)
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors themselves, lest their addresses be used again

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(unet)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@functools.cache
def flops(*actions: MemoryAction) -> int:
    """Of one forward and backward pass."""
    unet = unet_with(Sdpa(), *actions)
    with FlopCounterMode(display=False) as counter:
        loss_of(unet).backward()
    return counter.get_total_flops()
