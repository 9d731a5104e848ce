"""Aspect-ratio bucketing after NovelAI: canvases of about one area and many aspects, resize to cover, minimal crop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket, Bucketing, Placement


def novelai_buckets(resolution: int, step: int, max_aspect: float) -> list[Bucket]:
    """NovelAI's published scheme: for every width in steps the tallest height whose area stays within resolution^2,
    then with the roles swapped; unique sizes, ordered by aspect. Sizes are in pixels.
    """
    area = resolution * resolution
    half = [
        Bucket(width, height)
        for width in range(step, resolution + 1, step)
        if (height := area // width // step * step) <= width * max_aspect
    ]
    return sorted({*half, *(Bucket(b.height, b.width) for b in half)}, key=lambda b: (b.width / b.height, b))


def cover(width: int, height: int, bucket: Bucket) -> tuple[int, int]:
    """The size of an image of width x height resized to just cover `bucket`, in whole pixels."""
    factor = max(bucket.width / width, bucket.height / height)
    return max(bucket.width, round(width * factor)), max(bucket.height, round(height * factor))


class Assigned(NamedTuple):
    """`buckets` are those that occur, in order; `of` [N] tells which of them each image's is."""

    buckets: list[Bucket]
    of: NDArray[np.intp]

    def counts(self) -> dict[str, int]:
        """Name -> images, by name."""
        return dict(sorted((b.name, int(n)) for b, n in zip(self.buckets, np.bincount(self.of), strict=True)))


def assigned(sizes: NDArray[np.int32], bucketing: Bucketing) -> Assigned:
    """The buckets of images of `sizes` [N,2], width and height."""
    unique, of = np.unique(sizes, axis=0, return_inverse=True)
    found = [bucketing.assign(width, height) for width, height in unique.tolist()]
    buckets = sorted(set(found))
    places = {bucket: place for place, bucket in enumerate(buckets)}
    return Assigned(buckets, np.array([places[bucket] for bucket in found], np.intp)[of])


class _Placing:
    """What both bucketings share: `crops` positions along the cut axis (1 = centre) and, with `flip`, their mirror
    images are encoded for every image; a sample takes one of them by its position in the run.
    """

    buckets: list[Bucket]
    crops: int
    flip: bool

    def _refuse_nonsense(self) -> None:
        if self.crops < 1:
            raise UserError(f"bucketing.crops={self.crops}: must be at least 1")
        if not self.buckets or any(side % 8 for bucket in self.buckets for side in bucket):
            raise UserError(
                f"bucketing gives the canvases {[b.name for b in self.buckets]}; their sides must be multiples of 8, "
                "the autoencoder's factor. Change bucketing.resolution or bucketing.step."
            )

    def assign(self, width: int, height: int) -> Bucket:
        """The bucket nearest in log aspect to an image of width x height pixels."""
        wanted = math.log(width / height)
        return min(self.buckets, key=lambda b: abs(math.log(b.width / b.height) - wanted))

    def placements(self, width: int, height: int) -> list[Placement]:
        """Every way an image of width x height is put on its canvas."""
        bucket = self.assign(width, height)
        resized = cover(width, height, bucket)
        spare = resized[0] - bucket.width, resized[1] - bucket.height
        shares = [(i + 0.5) / self.crops for i in range(self.crops)]
        crops = dict.fromkeys((int(spare[0] * share), int(spare[1] * share)) for share in shares)
        return [Placement(bucket, resized, crop, flip) for crop in crops for flip in (False, True)[: 1 + self.flip]]


@dataclass(frozen=True)
class AspectBuckets(_Placing):
    """NovelAI's buckets: areas up to resolution^2, sides in multiples of `step`, aspects up to `max_aspect`.

    Raises UserError when no bucket results, or sides are not multiples of the autoencoder's 8 pixels.
    """

    resolution: Annotated[int, Field(ge=8)]
    step: int = 64
    max_aspect: float = 4.0
    crops: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        if self.step < 1:
            raise UserError(f"bucketing.step={self.step}: must be a multiple of 8")
        self._refuse_nonsense()

    @cached_property
    def buckets(self) -> list[Bucket]:  # type: ignore[override]
        return novelai_buckets(self.resolution, self.step, self.max_aspect)


@dataclass(frozen=True)
class SquareBucket(_Placing):
    """One square canvas for every image: the centre crop that aspect bucketing is compared with."""

    resolution: Annotated[int, Field(ge=8)]
    crops: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        self._refuse_nonsense()

    @cached_property
    def buckets(self) -> list[Bucket]:  # type: ignore[override]
        return [Bucket(self.resolution, self.resolution)]
