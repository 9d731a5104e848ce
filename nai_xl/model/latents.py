"""What counts as a normalised latent: normalised = (raw - mean) / std, with a mean and a std for each channel.

Every option has `dtype`, the autoencoder's precision while it encodes (SDXL's overflows in fp16), `stored`, that of the
raw latents in the cache (None: bf16 where training computes in it, else fp32), and `statistics(vae, measure)`, where
`measure()` looks at all raw latents of the data and gives their Moments.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from nai_xl.errors import UserError

Precision = Literal["fp32", "bf16"]
Stored = Literal["fp32", "bf16", "fp16"]
Statistics = tuple[Tensor, Tensor]
"""mean and std [C,1,1] float32 of the raw latents, as far as normalisation is concerned."""


@dataclass(frozen=True, eq=False)
class Moments:
    """How many values each channel has, their mean and the sum of their squared distances to it, [C] float64."""

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, latent: Tensor) -> Moments:
        """The moments of one latent [C,h,w], in two passes."""
        values = latent.flatten(1).double()
        mean = values.mean(1)
        return cls(values.shape[1], mean, (values - mean[:, None]).square().sum(1))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both parts together. Chan, Golub, LeVeque 1979, eq. 2.1: no difference of large squares."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        share, delta = other.count / count, other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.count * share)

    @property
    def std(self) -> Tensor:
        """[C] deviation of the values themselves (divided by their number)."""
        return (self.m2 / self.count).sqrt()


def moments(latents: Iterable[Tensor]) -> Moments:
    """The moments of all latents [C,h_i,w_i] together, one at a time: every pixel counts the same. None: count 0."""
    nothing = Moments(0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    return functools.reduce(Moments.__add__, map(Moments.of, latents), nothing)


Measure = Callable[[], Moments]


@dataclass(frozen=True)
class ScaleLatents:
    """One factor for all channels, normalised = factor x raw. Default: the autoencoder's own (0.13025 for SDXL)."""

    factor: float | None = None
    dtype: Precision = "fp32"
    stored: Stored | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and not 0 < self.factor < math.inf:
            raise UserError(f"latents.factor={self.factor} must be positive; null takes the autoencoder's own")

    def statistics(self, vae: AutoencoderKL, measure: Measure) -> Statistics:
        """The data are not looked at."""
        channels = vae.config.latent_channels
        factor = self.factor or vae.config.scaling_factor
        return torch.zeros(channels, 1, 1), torch.full((channels, 1, 1), 1 / factor)


@dataclass(frozen=True)
class PerChannelLatents:
    """Each channel shifted and scaled to mean 0 and std 1 over the user's own data. NovelAI V3, 2409.15997."""

    dtype: Precision = "fp32"
    stored: Stored | None = None

    def statistics(self, vae: AutoencoderKL, measure: Measure) -> Statistics:
        """Raises UserError where a channel is constant or not finite, so that it cannot be brought to std 1."""
        seen = measure()
        # raw latents are float32: a deviation below its resolution is rounding
        usable = seen.std.isfinite() & (seen.std > torch.finfo(torch.float32).eps * seen.mean.abs())
        if not usable.all():
            channel = int(usable.int().argmin())
            raise UserError(
                f"latents=per_channel: channel {channel} of the latents has mean {seen.mean[channel]:.4g} and std "
                f"{seen.std[channel]:.4g} over all images, which cannot be normalised; set latents=scale"
            )
        return _channels(seen.mean), _channels(seen.std)


@dataclass(frozen=True)
class GivenLatents:
    """Known statistics of raw latents: latents=anime has those that NovelAI V3, 2409.15997, publishes for its data."""

    mean: list[float]
    std: list[float]
    dtype: Precision = "fp32"
    stored: Stored | None = None

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, [*self.mean, *self.std])) or min(self.std, default=0) <= 0:
            raise UserError("latents.mean and latents.std must be finite numbers, and every std positive")

    def statistics(self, vae: AutoencoderKL, measure: Measure) -> Statistics:
        """The data are not looked at. Raises UserError unless there is one number for each channel."""
        channels = vae.config.latent_channels
        if (len(self.mean), len(self.std)) != (channels, channels):
            raise UserError(f"latents.mean and latents.std need {channels} numbers each, one for each latent channel")
        return _channels(self.mean), _channels(self.std)


def write_statistics(path: Path, statistics: Statistics, stored: Stored = "fp32") -> None:
    """As JSON, whose decimals give back the same bits, with the precision that the latents have in the cache."""
    mean, std = (values.flatten().tolist() for values in statistics)
    path.write_text(json.dumps({"mean": mean, "std": std, "stored": stored}))


def read_statistics(path: Path) -> tuple[Tensor, Tensor, Stored]:
    """What write_statistics wrote. Earlier versions, whose files tell no precision, kept latents in fp32.

    Raises UserError if it is damaged.
    """
    try:
        told = json.loads(path.read_text())
        stored: Stored = told.get("stored", "fp32")
        if stored not in get_args(Stored):
            raise ValueError(stored)
        return _channels(told["mean"]), _channels(told["std"]), stored
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; delete it to have it made anew, or set name=NAME for a new run") from error


def in_words(statistics: Statistics) -> str:
    """'mean 0.12 -1.3 ..., std 7.7 7.1 ...' for people."""
    mean, std = (" ".join(f"{value:.4g}" for value in values.flatten().tolist()) for values in statistics)
    return f"mean {mean}, std {std}"


def _channels(values: Tensor | list[float]) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
