"""AdamW with block-wise 8-bit moments and stochastically rounded bfloat16 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nai_xl.optimizer import blockwise, multi_tensor
from nai_xl.optimizer.adamw_bf16 import AdamWBf16
from nai_xl.optimizer.rounding import random_words
from nai_xl.optimizer.stochastic import flat


class AdamW8bit(AdamWBf16):
    """Dettmers et al., 2110.02861. Tensors under 4096 elements keep moments of their own type, as AdamWBf16 has them.

    6.03 bytes a bfloat16 parameter with its gradient. The codes are rounded to the nearest, as published: a second
    moment that stochastic rounding took to 0 would make a step of m / eps.
    """

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if not blockwise.fits(p):
            return super().new_state(p, group)
        state = {}
        for name in ("exp_avg", "exp_avg_sq"):
            state[f"{name}_codes"] = torch.zeros_like(p, dtype=torch.uint8)
            state[f"{name}_scales"] = torch.zeros(p.numel() // blockwise.BLOCK, device=p.device)
        return state

    def kind(self, p: Tensor, group: dict[str, Any]) -> Any:
        return blockwise.fits(p), super().kind(p, group)

    def update_all(self, group: dict[str, Any], params: list[Tensor], corrections: Tensor, keys: Tensor) -> None:
        if blockwise.fits(params[0]):
            multi_tensor.adamw8bit(self, group, params, corrections, keys)
        else:
            super().update_all(group, params, corrections, keys)

    def update_one(self, group: dict[str, Any], p: Tensor, correction: Tensor, key: Tensor) -> None:
        if not blockwise.fits(p):
            super().update_one(group, p, correction, key)
            return
        state = self.state[p]
        m = blockwise.decode(flat(state["exp_avg_codes"]), state["exp_avg_scales"], True)
        v = blockwise.decode(flat(state["exp_avg_sq_codes"]), state["exp_avg_sq_scales"], False)
        w, m, v = self.moved(group, p, m, v, correction)
        self.write(p, w, random_words(key, p.numel()) & 0xFFFF)
        for name, value, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
            codes, scales = blockwise.encode(value, signed)
            self.keep(state[f"{name}_codes"], codes)
            self.keep(state[f"{name}_scales"], scales)
