"""The noise of a training sample, a function of (seed, position) like every other random number of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nai_xl.errors import UserError
from nai_xl.rng import Draws


@dataclass(frozen=True)
class TrainingNoise:
    """Standard normal noise n, and two published departures from it; 0 turns either off.

    offset: n + offset z with one normal z for each channel of a sample, in x_t and in the target; variance
    1 + offset^2. Guttenberg, Diffusion with Offset Noise, 2023; 0.1 there.
    perturbation: x_t is made with n + perturbation z, z normal for each value, while the target keeps n; Ning et al.
    2301.11706, algorithm 1; 0.1 there.
    """

    offset: float = 0.0
    perturbation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("offset", "perturbation"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"noise.{name}={getattr(self, name)}: must be 0 (off) or positive, and finite")

    def __call__(self, samples: Sequence[Draws], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """For the latents of B samples, each of `shape` [4,h,w]: the noise [B,4,h,w], and what x_t has beside it,
        [B,4,h,w] or zeros [B,1,1,1].
        """
        noise = _normal(samples, shape, "noise")
        if self.offset:
            noise = noise + self.offset * _normal(samples, (shape[0], 1, 1), "noise offset")
        if not self.perturbation:
            return noise, torch.zeros(len(samples), 1, 1, 1)
        return noise, self.perturbation * _normal(samples, shape, "input perturbation")


def _normal(samples: Sequence[Draws], shape: Sequence[int], purpose: str) -> Tensor:
    """[B, *shape], each row a function of its sample's seed and position."""
    rows = torch.empty(len(samples), *shape)
    for row, draw in zip(rows, samples, strict=True):
        draw.noise(shape, purpose, out=row)
    return rows
