"""Loss weightings, each defined on the x0 error as w(SNR) and brought to the prediction error by x0_error_scale.

Every weighting returns [B] float32, the factor of a sample's mean squared prediction error. All are written with alpha
and sigma so that they stay finite at zero terminal SNR. Each raises ValueError for a constant that is not positive and
finite. Most are functions; one that has parameters to train is a LearnedWeighting.

[HDiT] Crowson et al. 2401.11605; [Debias] Yu et al. 2310.08442; [P2] Choi et al. 2204.00227; [EDM] Karras et al.
2206.00364; [EDM2] Karras et al. 2312.02696.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nai_xl.diffusion.error import require_positive
from nai_xl.interfaces import NoiseLevel, Parameterization, Weighting


def uniform(level: NoiseLevel, p: Parameterization) -> Tensor:
    """1 on the prediction error, whatever is predicted; Ho et al., 2006.11239, eq. 14."""
    return torch.ones_like(level.alpha)


def min_snr(level: NoiseLevel, p: Parameterization, *, gamma: float = 5.0) -> Tensor:
    """w = min(SNR, gamma); Hang et al., 2303.09556, section 3.4. For v: min(SNR, gamma) / (SNR + 1).

    Exactly 0 at zero terminal SNR with v: the step that ztsnr adds is then never trained.
    """
    require_positive("gamma", gamma)
    return level.snr.clamp(max=gamma) * p.x0_error_scale(level)


def min_snr_plus_one(level: NoiseLevel, p: Parameterization, *, gamma: float = 5.0) -> Tensor:
    """w = min(SNR + 1, gamma). For v: min(SNR + 1, gamma) / (SNR + 1), which is 1 at zero terminal SNR.

    diffusers' train_text_to_image_sdxl.py had this form for v up to version 0.25; since 0.26 it has that of min_snr,
    min(SNR, gamma) / (SNR + 1), whose weight at zero terminal SNR is 0.
    """
    require_positive("gamma", gamma)
    return (level.snr + 1).clamp(max=gamma) * p.x0_error_scale(level)


def soft_min_snr(level: NoiseLevel, p: Parameterization, *, gamma: float = 4.0) -> Tensor:
    """w = SNR gamma / (SNR + gamma), min-SNR with a round corner; [HDiT], soft-min-SNR, 1 / (s^2 + 1/gamma).

    For v: SNR gamma / ((SNR + gamma)(SNR + 1)), so 0 at zero terminal SNR. k-diffusion calls the weight
    (s sigma_data)^2 / (s^2 + sigma_data^2)^2 on its network's error "soft-min-snr": gamma = 1 / sigma_data^2, which is
    4 for the sigma_data = 0.5 of pixels and SNR / (SNR + 1)^2 on v for latents of unit variance (gamma = 1).
    """
    require_positive("gamma", gamma)
    return level.snr * gamma / (level.snr + gamma) * p.x0_error_scale(level)


def debiased(level: NoiseLevel, p: Parameterization) -> Tensor:
    """w = sqrt(SNR), which is 1 / sqrt(SNR) on the epsilon error; [Debias]'s objective.

    For v: sqrt(SNR) / (SNR + 1) = alpha sigma, so 0 at zero terminal SNR. Other trainers apply 1 / (SNR + 1) or
    1 / sqrt(SNR + 1) to the v error under the same name.
    """
    return level.alpha / level.sigma * p.x0_error_scale(level)


def p2(level: NoiseLevel, p: Parameterization, *, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """w = SNR / (k + SNR)^gamma, which is 1 / (k + SNR)^gamma on the epsilon error; [P2], perception prioritised.

    For v: SNR / ((k + SNR)^gamma (SNR + 1)), so 0 at zero terminal SNR.
    """
    require_positive("k", k)
    require_positive("gamma", gamma)
    return level.snr / (k + level.snr).pow(gamma) * p.x0_error_scale(level)


def edm(level: NoiseLevel, p: Parameterization, *, sigma_data: float = 1.0) -> Tensor:
    """w = (s^2 + sigma_data^2) / (s sigma_data)^2 with s = sigma/alpha; [EDM] table 1, lambda(s).

    That is (sigma^2 + sigma_data^2 alpha^2) / (sigma sigma_data)^2, and 1 / sigma_data^2 at zero terminal SNR. For v
    and sigma_data = 1, the deviation of normalised latents, it is the uniform weight.
    """
    require_positive("sigma_data", sigma_data)
    on_x0 = (level.sigma.square() + sigma_data**2 * level.alpha.square()) / (level.sigma * sigma_data).square()
    return on_x0 * p.x0_error_scale(level)


# --- learned ----------------------------------------------------------------------------------------------------------


class LearnedWeighting(nn.Module):
    """A weighting whose parameters are trained along with the network.

    Derive from it, or write a module with these members, and define `forward(level, p)`, which returns the weight [B]
    like any other weighting. The parameters are saved in checkpoints. They take no part in the averages, in gradient
    clipping or in the reported gradient norm, which are the network's.
    """

    def penalty(self, level: NoiseLevel) -> Tensor | None:
        """[B] what is added to the weighted error, so that weights of 0 are not the best ones; None: nothing."""
        return None

    def parameter_group(self) -> dict[str, Any]:
        """The optimizer's group of these parameters, with settings that differ from the network's."""
        return {"params": list(self.parameters())}


class Uncertainty(LearnedWeighting):
    """loss = exp(-u) base error + u with a learned u of the noise level; [EDM2] eq. 21.

    The best u is ln E[base error] at each level, so that every level's weighted error is 1 on average, whatever `base`
    is. [EDM2] makes u a small network of ln s, which is infinite at zero terminal SNR; here it is a cosine series of
    the angle atan2(sigma, alpha), u = sum over k < features of c_k cos(2 k angle). All c_k begin at 0, as `base` alone.

    The coefficients have a learning rate of their own and no weight decay. The reported loss holds u and can be
    negative: do not compare it with that of other weightings.
    """

    def __init__(self, base: Weighting = uniform, *, features: int = 16, lr: float = 5e-3):
        super().__init__()
        if features < 1:
            raise ValueError(f"features={features}: must be at least 1")
        require_positive("lr", lr)
        self.base, self.lr = base, lr
        self.coefficients = nn.Parameter(torch.zeros(features))

    def log_variance(self, level: NoiseLevel) -> Tensor:
        """u, [B] float32."""
        angle = torch.atan2(level.sigma, level.alpha)
        k = torch.arange(len(self.coefficients), device=angle.device)
        return torch.cos(2 * angle[:, None] * k) @ self.coefficients

    def forward(self, level: NoiseLevel, p: Parameterization) -> Tensor:
        """exp(-u) times the base weight, [B] float32."""
        return torch.exp(-self.log_variance(level)) * self.base(level, p)

    def penalty(self, level: NoiseLevel) -> Tensor:
        """u, [B] float32."""
        return self.log_variance(level)

    def parameter_group(self) -> dict[str, Any]:
        """The coefficients with their learning rate."""
        return {"params": [self.coefficients], "lr": self.lr, "weight_decay": 0.0}
