"""Learned uncertainty: weights of noise levels, trained along with the network. [EDM2] Karras et al. 2312.02696."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nai_xl.diffusion.loss import uniform
from nai_xl.errors import UserError
from nai_xl.interfaces import NoiseLevel, Parameterization, Weighting


class Uncertainty(nn.Module):
    """loss = exp(-u) base error + u with a learned u of the noise level; [EDM2] eq. 21.

    The best u is ln E[base error] at each level, so that every level's weighted error is 1 on average, whatever `base`
    is. [EDM2] makes u a small network of ln s, which is infinite at zero terminal SNR; here it is a cosine series of
    the angle atan2(sigma, alpha), u = sum over k < features of c_k cos(2 k angle). All c_k begin at 0, as `base` alone.

    The coefficients form a group of the optimizer with a learning rate of their own and no weight decay, are saved in
    checkpoints, and take no part in the averages, in gradient clipping or in the reported gradient norm, which are the
    network's. The reported loss holds u and can be negative: do not compare it with that of other weightings.
    """

    def __init__(self, base: Weighting = uniform, *, features: int = 16, lr: float = 5e-3):
        super().__init__()
        if features < 1 or not 0 < lr < float("inf"):
            raise UserError(f"loss.features={features} must be at least 1, and loss.lr={lr} positive and finite")
        self.base, self.lr = base, lr
        self.coefficients = nn.Parameter(torch.zeros(features))

    def log_variance(self, level: NoiseLevel) -> Tensor:
        """u, [B] float32: the term that is added to the weighted error."""
        angle = torch.atan2(level.sigma, level.alpha)
        k = torch.arange(len(self.coefficients), device=angle.device)
        return torch.cos(2 * angle[:, None] * k) @ self.coefficients

    def forward(self, level: NoiseLevel, p: Parameterization) -> Tensor:
        """exp(-u) times the base weight, [B] float32."""
        return torch.exp(-self.log_variance(level)) * self.base(level, p)

    def parameter_group(self) -> dict[str, Any]:
        """What the optimizer is told of the coefficients."""
        return {"params": [self.coefficients], "lr": self.lr, "weight_decay": 0.0}
