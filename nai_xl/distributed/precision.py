"""The group `precision`: what a forward pass computes in. Weights stay float32; see memory=bf16_weights for those."""

from __future__ import annotations

from dataclasses import dataclass

from nai_xl.interfaces import Precision


@dataclass(frozen=True)
class MixedPrecision:
    """torch.autocast to bfloat16 or float16 in the forward pass, or none; Micikevicius et al., 1710.03740."""

    autocast: Precision = "no"
