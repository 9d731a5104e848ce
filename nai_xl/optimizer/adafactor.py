"""Adafactor with stochastically rounded bfloat16 weights: state of a few bytes a row and column."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from nai_xl.optimizer import multi_tensor
from nai_xl.optimizer.rounding import random_words
from nai_xl.optimizer.stochastic import StochasticOptimizer, flat, in_layout_of


class Adafactor(StochasticOptimizer):
    """Shazeer and Stern, 1804.04235, algorithms 4 and 5 with the learning rate given: neither relative step sizes nor
    scaling by the parameter (their section 8), no first moment (section 6), update clipping at `clip` (section 5).

    A convolution's kernel [out,in,h,w] is the matrix [out, in h w] that it multiplies patches with. torch and
    transformers factor its last two axes instead, 3 x 3 in SDXL, and keep two thirds of a full second moment for it.
    """

    whole_tensors = True  # means of rows and columns, and the update's root mean square

    def __init__(
        self,
        params: Any,
        lr: Annotated[float, Field(ge=0)] = 1e-5,
        beta2_decay: Annotated[float, Field(le=0)] = -0.8,
        eps: Annotated[float, Field(gt=0)] = 1e-30,
        clip: Annotated[float, Field(gt=0)] = 1.0,
        weight_decay: Annotated[float, Field(ge=0)] = 0.0,
        seed: int = 0,
    ):
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "clip": clip, "weight_decay": weight_decay}
        super().__init__(params, defaults, seed)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if p.dim() < 2:
            return {"exp_avg_sq": torch.zeros_like(p, dtype=torch.float32)}
        sizes = {"row": p.shape[0], "column": p.numel() // p.shape[0]}
        return {name: p.new_zeros(size, dtype=torch.float32) for name, size in sizes.items()}

    def update(self, group: dict[str, Any], params: list[Tensor], steps: Tensor, keys: Tensor) -> None:
        decays = 1 - steps ** group["beta2_decay"]  # section 7.2
        for p, beta2, key in zip(params, decays, keys, strict=True):
            change = group["lr"] * self._clipped(group, p, beta2)
            decay = 1 - group["lr"] * group["weight_decay"]
            if multi_tensor.available(p):
                multi_tensor.subtract(self, p, change, decay, key)
            else:
                self.write(p, decay * flat(p).float() - change, random_words(key, p.numel()) & 0xFFFF)

    def _clipped(self, group: dict[str, Any], p: Tensor, beta2: Tensor) -> Tensor:
        """The update before the learning rate, float32 [numel] in the order of the parameter's storage."""
        assert p.grad is not None
        g = p.grad.float()
        scale = getattr(self, "grad_scale", None)
        g = g if scale is None else g / scale
        u = g * self._inverse_root(self.state[p], g, beta2, group["eps"])
        u = u / (u.square().mean().sqrt() / group["clip"]).clamp_min(1)  # algorithm 4: U / max(1, RMS(U) / d)
        return flat(in_layout_of(p, u))

    def _inverse_root(self, state: dict[str, Tensor], g: Tensor, beta2: Tensor, eps: float) -> Tensor:
        """1 / sqrt(V), [p.shape], after this step's gradient is taken into the averages."""
        square = g.square() + eps
        if g.dim() < 2:
            return self._average(state["exp_avg_sq"], square, beta2).rsqrt()
        square = square.flatten(1)
        row = self._average(state["row"], square.mean(1), beta2)
        column = self._average(state["column"], square.mean(0), beta2)
        # algorithm 4, V = R C / sum(R); with means in place of sums the sizes cancel
        return ((row / row.mean()).rsqrt()[:, None] * column.rsqrt()[None, :]).view(g.shape)

    def _average(self, average: Tensor, new: Tensor, beta2: Tensor) -> Tensor:
        value = beta2 * average + (1 - beta2) * new
        self.keep(average, value.view(-1))
        return value
