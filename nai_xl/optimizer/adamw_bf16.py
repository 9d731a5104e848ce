"""AdamW for bfloat16 weights: state in bfloat16 too, everything that is kept rounded stochastically."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from nai_xl.optimizer import dry_run, multi_tensor
from nai_xl.optimizer.rounding import further_words, random_words
from nai_xl.optimizer.stochastic import StochasticOptimizer, flat

Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]


class AdamWBf16(StochasticOptimizer):
    """Loshchilov and Hutter, 1711.05101, algorithm 2, as torch.optim.AdamW has it, in float32 arithmetic.

    Weights, gradients and both moments in the parameter's own type: 8 bytes a parameter in bfloat16, 16 in float32.
    The second moment needs the rounding as much as the weight: at beta2 = 0.999 a step changes it by at most 1/1000,
    which rounding to the nearest would mostly drop. The update itself uses the moments before they are rounded.
    On a GPU with Triton all tensors of a type are one kernel, elsewhere plain torch does the same sums.
    """

    def __init__(
        self,
        params: Any,
        lr: NotNegative = 1e-3,
        betas: tuple[Share, Share] = (0.9, 0.999),
        eps: NotNegative = 1e-8,
        weight_decay: NotNegative = 1e-2,
        seed: int = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}, seed)

    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def kind(self, p: Tensor, group: dict[str, Any]) -> Any:
        return p.numel() % 16 == 0  # one odd size would keep a kernel from wide loads for all

    def update(self, group: dict[str, Any], params: list[Tensor], steps: Tensor, keys: Tensor) -> None:
        if dry_run.active():  # the kernel writes in place
            return
        corrections = bias_corrections(group, steps)
        if multi_tensor.available(params[0]):
            self.update_all(group, params, corrections, keys)
            return
        for p, correction, key in zip(params, corrections, keys, strict=True):
            self.update_one(group, p, correction, key)

    def update_all(self, group: dict[str, Any], params: list[Tensor], corrections: Tensor, keys: Tensor) -> None:
        """One Triton kernel for all of `params`, which are of one kind."""
        multi_tensor.adamw(self, group, params, corrections, keys)

    def update_one(self, group: dict[str, Any], p: Tensor, correction: Tensor, key: Tensor) -> None:
        """The same in plain torch. `correction` is [2], a row of bias_corrections."""
        state, words = self.state[p], random_words(key, p.numel(), self.first_element(p))
        m, v = flat(state["exp_avg"]).float(), flat(state["exp_avg_sq"]).float()
        w, m, v = self.moved(group, p, m, v, correction)
        self.write(p, w, words & 0xFFFF)
        self.write(state["exp_avg"], m, words >> 16)
        self.write(state["exp_avg_sq"], v, further_words(words) & 0xFFFF)

    def moved(
        self, group: dict[str, Any], p: Tensor, m: Tensor, v: Tensor, correction: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weight and moments after this step, float32 [numel], from the moments before it."""
        (beta1, beta2), lr, g = group["betas"], group["lr"], self.gradient(p)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g * g)
        w = flat(p).float() * (1 - lr * group["weight_decay"])
        return w - lr * ((m / correction[0]) / (v.sqrt() / correction[1] + group["eps"])), m, v


def bias_corrections(group: dict[str, Any], steps: Tensor) -> Tensor:
    """[n,2] float32: 1 - beta1^t and sqrt(1 - beta2^t). In float64, for 1 - 0.999 has but 4 digits in float32."""
    t = steps.double()
    first, second = (1 - beta**t for beta in group["betas"])
    return torch.stack([first, second.sqrt()], dim=1).float()
