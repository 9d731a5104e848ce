"""AdamW with block-wise 8-bit moments and stochastically rounded bfloat16 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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

    per_block: ClassVar[Mapping[str, int]] = {"exp_avg_scales": blockwise.BLOCK, "exp_avg_sq_scales": blockwise.BLOCK}

    def fits(self, p: Tensor) -> bool:
        return blockwise.fits(p, self.parts.get(p))

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if not self.fits(p):
            return super().new_state(p, group)
        state = {}
        for name in ("exp_avg", "exp_avg_sq"):
            state[f"{name}_codes"] = torch.zeros_like(p, dtype=torch.uint8)
            state[f"{name}_scales"] = torch.zeros(p.numel() // blockwise.BLOCK, device=p.device)
        return state

    def kind(self, p: Tensor, group: dict[str, Any]) -> Any:
        return self.fits(p), super().kind(p, group)

    def update_all(self, group: dict[str, Any], params: list[Tensor], corrections: Tensor, keys: Tensor) -> None:
        if self.fits(params[0]):
            multi_tensor.adamw8bit(self, group, params, corrections, keys)
        else:
            super().update_all(group, params, corrections, keys)

    def update_one(self, group: dict[str, Any], p: Tensor, correction: Tensor, key: Tensor) -> None:
        if not self.fits(p):
            super().update_one(group, p, correction, key)
            return
        state = self.state[p]
        m = blockwise.decode(flat(state["exp_avg_codes"]), state["exp_avg_scales"], True)
        v = blockwise.decode(flat(state["exp_avg_sq_codes"]), state["exp_avg_sq_scales"], False)
        w, m, v = self.moved(group, p, m, v, correction)
        self.write(p, w, random_words(key, p.numel(), self.first_element(p)) & 0xFFFF)
        for name, value, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
            codes, scales = blockwise.encode(value, signed)
            self.keep(state[f"{name}_codes"], codes)
            self.keep(state[f"{name}_scales"], scales)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As its base. Moments of another kind are converted: a process that keeps whole tensors has some in 8 bits
        that another one, whose cuts go through their blocks, has not.
        """
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                if self.fits(p) and name in state:
                    codes, state[f"{name}_scales"] = blockwise.encode(flat(state.pop(name)).float(), signed)
                    state[f"{name}_codes"] = torch.empty_like(p, dtype=torch.uint8)
                    flat(state[f"{name}_codes"]).copy_(codes)
                elif not self.fits(p) and f"{name}_codes" in state:
                    codes, scales = flat(state.pop(f"{name}_codes")), state.pop(f"{name}_scales")
                    state[name] = torch.empty_like(p)
                    flat(state[name]).copy_(blockwise.decode_from(self.first_element(p), codes, scales, signed))
