"""Randomness as a function of position: (seed, position, purpose) names a random number, nothing else does.

Not the device, not the world size, not the number of workers, not how often the run was interrupted. Arms of an
ablation that share a seed therefore see the same images, noise and timesteps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def hashed(seed: int, position: int, purpose: str) -> int:
    """A 64-bit number from (seed, position, purpose)."""
    digest = hashlib.blake2b(f"{seed}/{position}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator(seed: int, position: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by the hash of its three arguments."""
    return torch.Generator().manual_seed(hashed(seed, position, purpose))


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of the sample at one position of the run."""

    seed: int
    position: int

    def uniform(self, purpose: str) -> float:
        """A number in [0,1) with 53 random bits."""
        return (hashed(self.seed, self.position, purpose) >> 11) * 2.0**-53

    @property
    def u(self) -> float:
        """The timestep draw, in [0,1)."""
        return self.uniform("timestep")

    def stratified_u(self, strata: int) -> float:
        """The timestep draw, in [0,1), of which each block of `strata` positions has one in every 1/strata.

        u = (perm[position % strata] + u0) / strata, perm being the permutation of block position // strata.
        """
        block, place = divmod(self.position, strata)
        order = torch.randperm(strata, generator=generator(self.seed, block, f"{strata} strata"))
        return min((int(order[place]) + self.u) / strata, 1 - 2.0**-53)  # rounding can reach 1

    def choice(self, purpose: str, count: int) -> int:
        """An index in 0..count-1, such as the crop and flip of an image."""
        return int(self.uniform(purpose) * count)

    def noise(self, shape: Sequence[int], purpose: str = "noise", *, out: Tensor | None = None) -> Tensor:
        """Standard normal float32 of `shape`, made on the CPU; with `out`, the same numbers written there."""
        return torch.randn(tuple(shape), generator=generator(self.seed, self.position, purpose), out=out)


def draws(seed: int, position: int) -> Draws:
    """The random numbers of sample number `position` of the run with this seed."""
    return Draws(seed, position)
