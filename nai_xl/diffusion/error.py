"""The error of a prediction before it is weighted: (prediction [B,C,h,w], target [B,C,h,w], level) -> [B] float32.

Every function is a mean over channels and pixels, and a factor 2 against torch's losses makes small errors of huber and
scheduled_huber cost what they cost under mse, so that arms with different errors compare. A weighting multiplies
whichever error is chosen. Each raises ValueError for a threshold that is not positive and finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from nai_xl.diffusion.schedule import per_sample
from nai_xl.interfaces import NoiseLevel


def require_positive(name: str, value: float) -> None:
    """ValueError for a parameter that is not positive and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value}: must be positive and finite")


def _per_sample_mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)


def mse(prediction: Tensor, target: Tensor, level: NoiseLevel) -> Tensor:
    """e^2."""
    return _per_sample_mean((prediction.float() - target).square())


def huber(prediction: Tensor, target: Tensor, level: NoiseLevel, *, delta: float = 0.1) -> Tensor:
    """e^2 up to |e| = delta, 2 delta |e| - delta^2 beyond: twice torch's huber_loss; Huber, 1964."""
    require_positive("delta", delta)
    return _per_sample_mean(2 * functional.huber_loss(prediction.float(), target, reduction="none", delta=delta))


def smooth_l1(prediction: Tensor, target: Tensor, level: NoiseLevel, *, beta: float = 0.1) -> Tensor:
    """e^2 / beta up to |e| = beta, 2 |e| - beta beyond: twice torch's smooth_l1_loss; Girshick, 1504.08083, eq. 3.

    It is huber / beta: the slope of large errors stays the same when beta changes. 2 |e| for small beta.
    """
    require_positive("beta", beta)
    return _per_sample_mean(2 * functional.smooth_l1_loss(prediction.float(), target, reduction="none", beta=beta))


def scheduled_huber(
    prediction: Tensor, target: Tensor, level: NoiseLevel, *, delta: float = 0.1, timesteps: int = 1000
) -> Tensor:
    """Pseudo-Huber 2 d^2 (sqrt(1 + e^2 / d^2) - 1) with d = delta^(t / timesteps); Khrapov et al. 2403.16728.

    The threshold runs exponentially from 1 at t = 0 to `delta` at the noisy end: delta below 1 is robust to outliers
    where the large shapes are made and squares the error where details are; delta above 1 does the reverse.
    `timesteps` is the number of the schedule's timesteps. Raises ValueError if the schedule has another number.
    """
    require_positive("delta", delta)
    require_positive("timesteps", timesteps)
    if level.timesteps is not None and level.timesteps != timesteps:
        raise ValueError(
            f"timesteps={timesteps}: the schedule has {level.timesteps}; set error.timesteps={level.timesteps}"
        )
    threshold = torch.exp(math.log(delta) * level.t.float() / timesteps)
    squared = (prediction.float() - target).square()
    # e^2 / (1 + sqrt(...)) is the same as d^2 (sqrt(...) - 1) and keeps its digits for small errors
    root = (1 + squared / per_sample(threshold, squared).square()).sqrt()
    return _per_sample_mean(2 * squared / (1 + root))
