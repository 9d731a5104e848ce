"""Gradient checkpointing: activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GradientCheckpointing:
    """Keep the inputs of some blocks only; Chen et al., 1604.06174.

    blocks: `all` recomputes every ResNet and transformer block, `transformer` the transformer blocks, `ff` just their
    feed-forward layers, which hold the widest activations. No parameter is renamed. Blocks compiled in place
    (nn.Module.compile), before or after, are recomputed as compiled.
    """

    blocks: Literal["all", "transformer", "ff"] = "all"
    tolerance: ClassVar[float] = 0.0  # the recomputation runs the same kernels on the same inputs

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
    """checkpoint(function, *args). Saving the random state waits for the GPU in every block: only dropout needs it."""
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout)
