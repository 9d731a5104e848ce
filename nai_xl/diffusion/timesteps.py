"""Timestep samplers: u in [0,1) -> t. They hold no randomness of their own; u comes from the sample's position.

All rise with u and map u [B] float64 -> whole timesteps t [B] int64. x below is t's place in the table, from 0 (clean)
to 1 (noise), so that densities stand on x. A sampler that wants its draws stratified is a StratifiedSampler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nai_xl.interfaces import Schedule, TimestepSampler


def uniform(u: Tensor, schedule: Schedule) -> Tensor:
    """Every timestep 0..T-1 equally likely: density 1."""
    return _at_share(u, schedule)


@runtime_checkable
class StratifiedSampler(Protocol):
    """A sampler whose u are drawn stratified: of each block of consecutive samples one from each of equal intervals."""

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor: ...

    def strata_for(self, images_per_step: int) -> int | None:
        """How many consecutive samples share out the interval [0,1); None: every u is drawn on its own."""
        ...


def strata_of(sampler: TimestepSampler, images_per_step: int) -> int | None:
    """The strata of a sampler; None for one that has no `strata_for`, such as a plain function."""
    return sampler.strata_for(images_per_step) if isinstance(sampler, StratifiedSampler) else None


@dataclass(frozen=True)
class Stratified:
    """Uniform, with low variance over the batch: each `strata` consecutive samples take one u from each of as many
    equal intervals. The loader draws them so (nai_xl.rng); None means the images of one optimizer step. Density 1.
    """

    strata: int | None = None

    def __post_init__(self) -> None:
        if self.strata is not None and self.strata < 1:
            raise ValueError(f"strata={self.strata}: must be at least 1, or null")

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return uniform(u, schedule)

    def strata_for(self, images_per_step: int) -> int:
        return self.strata or images_per_step


@dataclass(frozen=True)
class LogitNormal:
    """logit(x) is normal with `mean` and `std`; Esser et al. 2403.03206, eq. 19. A larger mean means more noise.

    Density exp(-(logit x - mean)^2 / (2 std^2)) / (std sqrt(2 pi) x (1 - x)). The paper's x is rectified flow's time;
    here it is the place in the table.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std={self.std}: must be above 0")

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return _at_share((self.mean + self.std * torch.special.ndtri(u)).sigmoid(), schedule)


@dataclass(frozen=True)
class HighNoise:
    """Emphasis on the noisy end: density (1 + emphasis) x^emphasis. 0 is uniform, 1 rises linearly."""

    emphasis: float = 1.0

    def __post_init__(self) -> None:
        if not self.emphasis >= 0:
            raise ValueError(f"emphasis={self.emphasis}: must be at least 0")

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return _at_share(u ** (1 / (1 + self.emphasis)), schedule)


@dataclass(frozen=True)
class InferenceGrid:
    """Only the levels that a sampler of `steps` steps visits, each equally often: density 1 / steps on each of them."""

    steps: int = 28

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be at least 1")

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        if self.steps > len(schedule):
            raise ValueError(f"steps={self.steps}: the schedule has only {len(schedule)} timesteps")
        grid = schedule.inference_timesteps(self.steps).flip(0).to(u.device, non_blocking=True)
        return grid[(u * self.steps).long()]


def density(sampler: TimestepSampler, schedule: Schedule, *, per_timestep: int = 200) -> Tensor:
    """How often `sampler` takes each timestep: [T] float64 with sum 1, by sending a regular grid of u through it.

    Exact to 1 / (T per_timestep) of probability for each run of equal t.
    """
    count = per_timestep * len(schedule)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return sampler(u, schedule).round().long().bincount(minlength=len(schedule)).double() / count


def _at_share(x: Tensor, schedule: Schedule) -> Tensor:
    """The timestep at place x in [0,1] of the table; 1 itself, which rounding can give, is the last timestep."""
    return (x * len(schedule)).long().clamp(max=len(schedule) - 1)
