"""Convolutions in NHWC order, which tensor cores want, from one to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from nai_xl.memory.action import MemoryAction
from nai_xl.memory.group_norm import group_norm


@dataclass(frozen=True)
class ChannelsLast(MemoryAction):
    """Weights and activations of convolutions in NHWC order.

    Moving the weights alone is not enough: in training diffusers turns a ResNet block's shortcut and every
    transformer's output back to NCHW, and torch's GroupNorm on CUDA answers in NCHW (pytorch/pytorch#111824). Here the
    blocks keep the order, and GroupNorm and SiLU are one operation. No parameter is renamed.
    """

    tolerance = 1e-5  # convolutions and norms sum in another order; relative, in float32

    def apply(self, model: Any) -> None:
        model.to(memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, ResnetBlock2D) and _is_plain(module):
                module.__class__ = ChannelsLastResnet
            elif isinstance(module, Transformer2DModel):
                module.__class__ = ChannelsLastTransformer
            elif type(module) is nn.GroupNorm:
                module.__class__ = ChannelsLastGroupNorm


def _is_plain(block: ResnetBlock2D) -> bool:
    """SDXL's kind of ResNet block: neither resizes nor scales by the time embedding, and activates by SiLU."""
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and isinstance(block.nonlinearity, nn.SiLU)
    )


class ChannelsLastGroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor, silu: bool = False) -> Tensor:
        """[B,C,h,w] -> [B,C,h,w] in the same memory order, through SiLU if asked; tokens [B,C,n] as torch does."""
        if input.ndim != 4:
            return super().forward(input)
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, silu=silu)


class ChannelsLastResnet(ResnetBlock2D):
    """ResnetBlock2D less its shortcut's copy to NCHW, which is there for DistributedDataParallel's strides alone."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B,C,h,w], time embedding [B,E] -> [B,C',h,w]"""
        hidden = self.conv1(self.norm1(input_tensor, silu=True))
        if self.time_emb_proj is not None and temb is not None:
            hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.norm2(hidden, silu=True)))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (shortcut + hidden) / self.output_scale_factor


class ChannelsLastTransformer(Transformer2DModel):
    """Transformer2DModel that leaves its tokens where they are: [B,hw,C] in memory is [B,C,h,w] in NHWC order."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        tokens = self.proj_out(hidden_states) if self.use_linear_projection else hidden_states
        picture = tokens.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        return (picture if self.use_linear_projection else self.proj_out(picture)) + residual
