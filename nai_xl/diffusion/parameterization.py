"""What the network predicts: v, epsilon or sample, each with its target, its x0 and its error scale.

x0_error_scale is |x0 error|^2 / |prediction error|^2. It turns a weight on the x0 error into one on the prediction
error and so replaces every branch on the prediction type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nai_xl.diffusion.schedule import per_sample
from nai_xl.interfaces import NoiseLevel


@dataclass(frozen=True)
class V:
    """v = alpha n - sigma x0; Salimans and Ho, 2202.00512, appendix D."""

    prediction_type = "v_prediction"
    defined_at_zero_snr = True

    def target(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        return per_sample(level.alpha, x0) * noise - per_sample(level.sigma, x0) * x0

    def to_x0(self, xt: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor:
        return per_sample(level.alpha, xt) * xt - per_sample(level.sigma, xt) * prediction

    def x0_error_scale(self, level: NoiseLevel) -> Tensor:
        """sigma^2 = 1 / (SNR + 1)."""
        return level.sigma.square()


@dataclass(frozen=True)
class Epsilon:
    """The noise n; Ho et al., 2006.11239. Undefined at SNR = 0, where x_t tells nothing of x0."""

    prediction_type = "epsilon"
    defined_at_zero_snr = False

    def target(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        return noise

    def to_x0(self, xt: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor:
        return (xt - per_sample(level.sigma, xt) * prediction) / per_sample(level.alpha, xt)

    def x0_error_scale(self, level: NoiseLevel) -> Tensor:
        """sigma^2 / alpha^2 = 1 / SNR."""
        return (level.sigma / level.alpha).square()


@dataclass(frozen=True)
class Sample:
    """The clean latent x0."""

    prediction_type = "sample"
    defined_at_zero_snr = True

    def target(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        return x0

    def to_x0(self, xt: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor:
        return prediction

    def x0_error_scale(self, level: NoiseLevel) -> Tensor:
        return torch.ones_like(level.alpha)
