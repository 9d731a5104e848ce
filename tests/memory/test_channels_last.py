"""Convolutions keep NHWC order from one to the next."""

import functools
from collections import Counter

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from nai_xl.memory.attention import Sdpa
from nai_xl.memory.channels_last import ChannelsLast, ChannelsLastGroupNorm
from tests.memory.counted import unet_with
from tests.memory.test_memory import loss_of, plain_unet


def is_nhwc(tensor: Tensor) -> bool:
    """Channels are neighbours in memory; part of a concatenation, which has gaps between pixels, counts as well."""
    return tensor.stride(1) == 1


def orders(unet: nn.Module) -> Counter[str]:
    """How many tensors enter and leave convolutions and norms, forward and backward, in which order."""
    found: Counter[str] = Counter()

    def look(name: str, tensor: Tensor) -> None:
        if tensor.shape[1] > 4:  # the latents are what the loader made them, and 4 channels are little to turn
            found[f"{name} {'nhwc' if is_nhwc(tensor) else 'nchw'}"] += 1

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        look("in", args[0])
        look("out", out)
        out.register_hook(functools.partial(look, "gradient"))

    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.register_forward_hook(hook)
    loss_of(unet).backward()
    return found


def test_activations_keep_channels_last_order_throughout() -> None:
    found = orders(unet_with(Sdpa(), ChannelsLast()))
    assert {name for name in found if name.endswith("nchw")} == set()
    assert found["in nhwc"] > 60 and found["gradient nhwc"] > 60
    # what moving the weights alone comes to: the test can tell the difference
    assert orders(unet_with(Sdpa()).to(memory_format=torch.channels_last))["in nchw"] == 24


def test_a_norm_of_tokens_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder's attention normalises [B,C,n], which the kernel for pictures does not know."""
    monkeypatch.setattr("nai_xl.memory.channels_last.group_norm", None)
    norm = ChannelsLastGroupNorm(2, 4)
    tokens = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(tokens), nn.functional.group_norm(tokens, 2, norm.weight, norm.bias, norm.eps))


def test_channels_last_swaps_every_block_and_nothing_in_its_weights() -> None:
    unet, before = unet_with(ChannelsLast()), plain_unet()
    assert unet.mid_block.resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel | nn.GroupNorm):
            assert type(module).__name__.startswith("ChannelsLast")
            assert isinstance(module, type(before.get_submodule(name)))
