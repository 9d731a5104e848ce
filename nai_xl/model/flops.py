"""Floating-point operations of the UNet, counted on tensors without storage: no GPU, no weights, about a second."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nai_xl.interfaces import Bucket

FORWARDS_PER_STEP = 3
"""Training costs three forward passes: the backward pass has two products (by input and by weight) for each of the
forward pass's one. PaLM, 2204.02311, appendix B, which also leaves recomputation out, so that MFU shows its price.
"""


def forward_flops(unet: UNet2DConditionModel, height: int, width: int, *, tokens: int = 77) -> int:
    """FLOPs of one image's forward pass on a canvas of height x width pixels; a multiplication and an addition are 2.

    Matrix products, convolutions and attention are counted, as torch's FlopCounterMode does; what is done element by
    element is not. `unet` is asked for its config alone: it may lie on any device. Equal calls are counted once.
    """
    return _forward_flops(json.dumps(dict(unet.config), sort_keys=True, default=str), height, width, tokens)


def training_flops(unet: UNet2DConditionModel, height: int, width: int, *, tokens: int = 77) -> int:
    """FLOPs of one image's training step: 3 x forward, however much is recomputed. The numerator of MFU."""
    return FORWARDS_PER_STEP * forward_flops(unet, height, width, tokens=tokens)


def by_area(count: Callable[[int, int], int], canvases: Iterable[Bucket]) -> dict[Bucket, int]:
    """FLOPs of one image on each canvas, from `count`(height, width), which takes a second for SDXL.

    Convolutions and linear layers go with the number of tokens, self-attention with its square: three canvases are
    counted, and a parabola through them gives the rest. Exact while every side is a multiple of the UNet's own factor.
    """
    of_area = {bucket.width * bucket.height: bucket for bucket in canvases}
    ordered = sorted(of_area)
    nodes = ordered if len(ordered) <= 3 else [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    known = {area: count(of_area[area].height, of_area[area].width) for area in nodes}
    return {bucket: int(_parabola(known, bucket.width * bucket.height)) for bucket in canvases}


def _parabola(known: Mapping[int, int], at: int) -> Fraction:
    """Lagrange's polynomial through these points."""
    total = Fraction(0)
    for x, y in known.items():
        weight = Fraction(1)
        for other in known:
            if other != x:
                weight *= Fraction(at - other, x - other)
        total += y * weight
    return total


@functools.lru_cache(maxsize=256)
def _forward_flops(config: str, height: int, width: int, tokens: int) -> int:
    unet = skeleton(json.loads(config))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs(unet, 1, height, width, tokens=tokens, device="meta"))
    return int(counter.get_total_flops())


def skeleton(config: dict[str, Any]) -> UNet2DConditionModel:
    """A UNet of this config whose parameters have shapes and no storage."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def inputs(
    unet: UNet2DConditionModel, batch: int, height: int, width: int, *, tokens: int = 77, device: str | torch.device
) -> dict[str, Any]:
    """The UNet's arguments for `batch` images of height x width pixels, as interfaces.Batch has them, float32 zeros."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, *shape, device=device)

    return {
        "sample": zeros(config.in_channels, height // 8, width // 8),
        "timestep": zeros(),
        "encoder_hidden_states": zeros(tokens, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": zeros(pooled), "time_ids": zeros(6)},
    }
