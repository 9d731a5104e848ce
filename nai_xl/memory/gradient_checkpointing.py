"""Gradient checkpointing: activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nai_xl.memory.action import MemoryAction
from nai_xl.memory.recompute import can_be_unread, recomputed


@dataclass(frozen=True)
class GradientCheckpointing(MemoryAction):
    """Keep the inputs of some blocks only; Chen et al., 1604.06174.

    blocks: `all` recomputes every ResNet and transformer block, `transformer` the transformer blocks, `ff` just their
    feed-forward layers, which hold the widest activations. No parameter is renamed. Blocks compiled in place
    (nn.Module.compile), before or after, are recomputed as compiled.
    """

    blocks: Literal["all", "transformer", "ff"] = "all"
    # The same kernels on the same inputs: the loss is equal to the bit. The gradient of what a skip connection carries
    # is a sum of three, of which a recomputed block adds its own two first.
    tolerance = 1e-6
    changes_weights = False

    @property
    def unets_only(self) -> bool:
        return self.blocks != "all"  # an autoencoder has no transformer blocks

    def apply(self, model: Any) -> None:
        run = _recomputed(model)
        if self.blocks == "all":
            model.enable_gradient_checkpointing(run)
        for module in model.modules():
            if self.blocks == "transformer" and isinstance(module, Transformer2DModel):
                module._gradient_checkpointing_func, module.gradient_checkpointing = run, True
            if self.blocks == "ff" and isinstance(module, BasicTransformerBlock):
                module.ff.__class__ = RecomputedFeedForward
                module.ff.run = run


class RecomputedFeedForward(FeedForward):
    """FeedForward that keeps its input only. Existing layers become one by their class, which renames nothing."""

    run: Callable[..., Tensor]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B,N,C] -> [B,N,C]"""
        return self.run(super().forward, hidden_states)


def _recomputed(model: nn.Module) -> Callable[..., Any]:
    """checkpoint(function, *args), by torch where it is needed: with dropout, compiled blocks or several processes.

    Saving the random state waits for the GPU in every block: only dropout needs it.
    """
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    by_torch = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout)

    def run(function: Callable[..., Any], *args: Any) -> Any:
        if dropout or torch.distributed.is_initialized() or _compiled(function) or not _reached(args):
            return by_torch(function, *args)
        return recomputed(function, _ends(function), *args)

    return run


def _compiled(function: Any) -> bool:
    return torch.compiler.is_compiling() or getattr(function, "_compiled_call_impl", None) is not None


def _reached(args: Sequence[Any]) -> bool:
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _ends(function: Any) -> list[nn.Module]:
    """The layers of a block that nothing but a sum comes after."""
    block = getattr(function, "__self__", function)  # of a bound method, its object
    last: list[Any] = []
    if isinstance(block, ResnetBlock2D):
        last = [block.conv2, block.conv_shortcut]
    elif isinstance(block, BasicTransformerBlock) and block.norm_type == "layer_norm":  # others have a gate after it
        last = [block.ff.net[-1]]
    elif isinstance(block, FeedForward):
        last = [block.net[-1]]
    return [layer for layer in last if can_be_unread(layer)]
