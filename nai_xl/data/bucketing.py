"""Aspect-ratio bucketing after NovelAI: canvases of about one area and many aspects, resize to cover, minimal crop.

All images are placed at once by array operations; what a single sample needs is placed by itself, equally.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket, Bucketing, Placement, Places

Tier = tuple[Bucket, ...]  # canvases of one area, ordered by aspect
Scheme = Literal["novelai", "half"]
Enlarge = Annotated[float, Field(ge=1)]
Cut = Annotated[float, Field(ge=0, lt=1)]
Resolution = Annotated[int, Field(ge=8)]
BLOCK = 1 << 20  # images that are placed at once, so that ten million need no more memory than one


def aspect_buckets(
    scheme: Scheme,
    resolution: int,
    step: int,
    *,
    min_side: int | None = None,
    max_side: int | None = None,
    max_aspect: float = 4.0,
) -> list[Bucket]:
    """For every width in steps the tallest height whose area stays within resolution^2, then with the roles swapped;
    unique sizes, ordered by aspect. Sizes are in pixels.

    `novelai` is the published scheme: widths go from half the resolution to twice of it
    (github.com/NovelAI/novelai-aspect-ratio-bucketing). `half` has widths up to the resolution alone, and so about half
    of these canvases. min_side and max_side are other limits.
    """
    area, published = resolution * resolution, scheme == "novelai"
    least = min_side or (resolution / 2 if published else step)
    most = max_side or (2 * resolution if published else area)
    widths = range(math.ceil(least / step) * step, math.floor(most if published else min(most, resolution)) + 1, step)
    tallest = [Bucket(width, min(area // width, most) // step * step) for width in widths]
    half = [b for b in tallest if min(b) >= max(least, step) and max(b) <= min(b) * max_aspect]
    return sorted({*half, *(Bucket(b.height, b.width) for b in half)}, key=_by_aspect)


def _by_aspect(bucket: Bucket) -> tuple[float, Bucket]:
    return bucket.width / bucket.height, bucket


@functools.cache
def turning_points(tier: Tier) -> list[float]:
    """The least width / height of an image that is nearer in log aspect to the wider of each two neighbours.

    They are found by bisection over floats. So the canvas is that of the definition for every size, ties included,
    whatever numpy's logarithm rounds to.
    """

    def turn(narrow: Bucket, wide: Bucket) -> float:
        low, high = narrow.width / narrow.height, wide.width / wide.height
        ends = math.log(low), math.log(high)
        while low < (middle := (low + high) / 2) < high:
            at = math.log(middle)
            low, high = (low, middle) if abs(ends[1] - at) < abs(ends[0] - at) else (middle, high)
        return high

    return [turn(*pair) for pair in pairwise(tier)]


def cover(width: int, height: int, bucket: Bucket) -> tuple[int, int]:
    """The size of an image of width x height resized to just cover `bucket`, in whole pixels."""
    factor = max(bucket.width / width, bucket.height / height)
    return max(bucket.width, round(width * factor)), max(bucket.height, round(height * factor))


class Assigned(NamedTuple):
    """`buckets` are those that occur, in order; `of` [N] tells which of them each image's is."""

    buckets: list[Bucket]
    of: NDArray[np.uint16]


def assigned(sizes: NDArray[np.int32], bucketing: Bucketing) -> Assigned:
    """The buckets of images of `sizes` [N,2], width and height."""
    numbers, buckets = bucketing.buckets_of(sizes), bucketing.buckets
    used = np.flatnonzero(np.bincount(numbers, minlength=len(buckets)))
    order = sorted(used.tolist(), key=buckets.__getitem__)
    places = np.zeros(len(buckets), np.uint16)
    places[order] = np.arange(len(order))
    return Assigned([buckets[number] for number in order], places[numbers])


class _Placing:
    """What all bucketings share: `crops` positions along the cut axis (1 = centre) and, with `flip`, their mirror
    images are encoded for every image; a sample takes one of them by its position in the run.

    An image goes to the largest tier whose canvas need not enlarge it, else to the smallest; there to the canvas that
    is nearest in log aspect.
    """

    tiers: Sequence[Tier]  # by area
    step: int = 8  # sides are multiples of it
    crops: int
    flip: bool
    max_enlarge: float | None  # limits of what is trained on: data.report
    max_cut: float | None
    merge_small: bool

    @cached_property
    def buckets(self) -> list[Bucket]:
        return list(chain.from_iterable(self.tiers))

    def __post_init__(self) -> None:
        if self.step < 1:
            raise UserError(f"bucketing.step={self.step}: must be a multiple of 8")
        if self.crops < 1:
            raise UserError(f"bucketing.crops={self.crops}: must be at least 1")
        if not all(self.tiers):
            raise UserError(
                "bucketing leaves no canvas: none has sides, aspect and area within its limits; change "
                "bucketing.resolution, bucketing.step, bucketing.max_aspect, bucketing.min_side or bucketing.max_side"
            )
        if any(side % 8 for bucket in self.buckets for side in bucket):
            raise UserError(
                f"bucketing gives the canvases {[b.name for b in self.buckets]}; their sides must be multiples of 8, "
                "the autoencoder's factor. Change bucketing.resolution or bucketing.step."
            )

    def assign(self, width: int, height: int) -> Bucket:
        """The canvas of an image of width x height pixels."""
        nearest = [tier[bisect_right(turning_points(tier), width / height)] for tier in self.tiers]
        fitting = (b for b in reversed(nearest) if b.width <= width and b.height <= height)
        return next(fitting, nearest[0])

    def placements(self, width: int, height: int) -> list[Placement]:
        """Every way an image of width x height is put on its canvas."""
        bucket = self.assign(width, height)
        resized = cover(width, height, bucket)
        spare = resized[0] - bucket.width, resized[1] - bucket.height
        crops = dict.fromkeys((int(spare[0] * share), int(spare[1] * share)) for share in self._shares)
        return [Placement(bucket, resized, crop, flip) for crop in crops for flip in (False, True)[: 1 + self.flip]]

    @property
    def _shares(self) -> list[float]:
        return [(i + 0.5) / self.crops for i in range(self.crops)]

    # --- all images at once -------------------------------------------------------------------------------------------

    def buckets_of(self, sizes: NDArray[np.int32]) -> NDArray[np.uint16]:
        """`assign` for [N,2] widths and heights: [N] places in `buckets`."""
        found = np.empty(len(sizes), np.uint16)
        for start in range(0, len(sizes), BLOCK):
            found[start : start + BLOCK] = self._numbers(sizes[start : start + BLOCK])
        return found

    def _numbers(self, sizes: NDArray[np.int32]) -> NDArray[np.int64]:
        aspects, canvases = sizes[:, 0] / sizes[:, 1], np.array(self.buckets)
        found, first = np.zeros(0, np.int64), 0
        for tier in self.tiers:
            numbers = first + np.searchsorted(turning_points(tier), aspects, side="right")
            fits = (canvases[numbers] <= sizes).all(1)
            found = np.where(fits, numbers, found) if first else numbers
            first += len(tier)
        return found

    def places(self, sizes: NDArray[np.int32]) -> Places:
        """`placements` for [N,2] widths and heights."""
        bucket = np.array(self.buckets)[self.buckets_of(sizes)]
        factor = (bucket / sizes).max(1, keepdims=True)
        resized = np.maximum(bucket, np.rint(sizes * factor).astype(np.int64))  # both round half to even
        spare = resized - bucket
        crops = np.stack([(spare * share).astype(np.int64) for share in self._shares], axis=1)  # [N,crops,2]
        new = np.ones(crops.shape[:2], bool)  # crops follow each other: equal ones are neighbours
        new[:, 1:] = (crops[:, 1:] != crops[:, :-1]).any(2)
        image, crop = np.nonzero(new)
        rows = np.concatenate([bucket[image], resized[image], crops[image, crop]], axis=1)
        flips = np.arange(1 + self.flip)
        every = np.column_stack([rows.repeat(len(flips), axis=0), np.tile(flips, len(rows))]).astype(np.int32)
        return Places(every, new.sum(1) * len(flips))

    def merged(self, sizes: NDArray[np.int32], chunk: int) -> _Placing:
        """With merge_small, the same without the canvases that have fewer than `chunk` of the images of these sizes.

        Their images go to the nearest canvas that is left. The smallest goes first, until none is too small or one is
        left.
        """
        if not self.merge_small or not len(sizes):
            return self
        pairs, times = np.unique(np.ascontiguousarray(sizes, np.int32).view(np.int64), return_counts=True)
        distinct = pairs.view(np.int32).reshape(-1, 2)
        left: _Placing = self
        while len(left.buckets) > 1:
            counts = np.bincount(left.buckets_of(distinct), times, len(left.buckets))
            if counts.min() >= chunk:
                break
            # canvases without images go together: nothing moves
            leaving = counts == 0 if not counts.all() else np.arange(len(counts)) == counts.argmin()
            gone = {left.buckets[i] for i in np.flatnonzero(leaving)}
            tiers = [tuple(b for b in tier if b not in gone) for tier in left.tiers]
            left = Canvases([tier for tier in tiers if tier], self.crops, self.flip, merge_small=True)
        return left


@dataclass(frozen=True)
class Canvases(_Placing):
    """Any canvases: what a bucketing leaves of its own when small ones are merged."""

    tiers: Sequence[Tier]
    crops: int = 1
    flip: bool = False
    max_enlarge: float | None = None
    max_cut: float | None = None
    merge_small: bool = False


@dataclass(frozen=True)
class AspectBuckets(_Placing):
    """NovelAI's buckets: areas up to resolution^2, sides in multiples of `step`, aspects up to `max_aspect`.

    scheme: `novelai` is the published one, 33 canvases at 1024 with sides from 512 to 2048; `half` has 17 of them, and
    is what earlier versions used. An image that would be enlarged by more than max_enlarge, or would lose a larger
    share of its area than max_cut, is left out; null leaves none out. merge_small: the images of a canvas that has
    fewer than a chunk of them go to the nearest canvas with more.

    Raises UserError when no bucket results, or sides are not multiples of the autoencoder's 8 pixels.
    """

    resolution: Resolution
    step: int = 64
    max_aspect: float = 4.0
    crops: int = 1
    flip: bool = False
    scheme: Scheme = "half"
    min_side: Annotated[int, Field(ge=8)] | None = None
    max_side: Annotated[int, Field(ge=8)] | None = None
    max_enlarge: Enlarge | None = None
    max_cut: Cut | None = None
    merge_small: bool = False

    @cached_property
    def tiers(self) -> list[Tier]:  # type: ignore[override]
        limits = {"min_side": self.min_side, "max_side": self.max_side}
        return [tuple(aspect_buckets(self.scheme, self.resolution, self.step, **limits, max_aspect=self.max_aspect))]


@dataclass(frozen=True)
class MultiBuckets(_Placing):
    """NovelAI's published buckets for several resolutions: an image goes to the largest that need not enlarge it, else
    to the smallest. resolutions: null are half, three quarters and all of `resolution`, in whole steps.

    max_enlarge, max_cut and merge_small are those of bucketing=aspect. Raises UserError as that does.
    """

    resolution: Resolution
    resolutions: Annotated[Sequence[Resolution], Field(min_length=1)] | None = None
    step: int = 64
    max_aspect: float = 4.0
    crops: int = 1
    flip: bool = False
    max_enlarge: Enlarge | None = None
    max_cut: Cut | None = None
    merge_small: bool = False

    @cached_property
    def tiers(self) -> list[Tier]:  # type: ignore[override]
        parts = [max(self.step, self.resolution * part // 4 // self.step * self.step) for part in (2, 3, 4)]
        found = [
            aspect_buckets("novelai", resolution, self.step, max_aspect=self.max_aspect)
            for resolution in sorted({*(self.resolutions or parts)})
        ]
        seen: set[Bucket] = set()  # a canvas belongs to the lowest resolution that has it
        tiers = []
        for buckets in found:
            own = tuple(b for b in buckets if b not in seen)
            if own or not buckets:  # without any canvas it is refused; with those of another it is not needed
                tiers.append(own)
            seen.update(buckets)
        return tiers


# width by height at 1024, with the paper's own gap: 704 x 1344 without its mirror image
SDXL_TABLE = (
    "512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 "
    "768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896 "
    "1152x896 1152x832 1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 "
    "1856x512 1920x512 1984x512 2048x512"
)


@dataclass(frozen=True)
class SdxlTable(_Placing):
    """The 40 canvases that SDXL was trained on; Podell et al., 2307.01952, appendix I.

    They are those of a resolution of 1024; another resolution scales them, and must be a multiple of 128 to keep sides
    in multiples of 8 pixels. max_enlarge, max_cut and merge_small are those of bucketing=aspect.
    """

    resolution: Resolution = 1024
    crops: int = 1
    flip: bool = False
    max_enlarge: Enlarge | None = None
    max_cut: Cut | None = None
    merge_small: bool = False

    def __post_init__(self) -> None:
        if self.resolution % 128:
            raise UserError(
                f"bucketing.resolution={self.resolution}: SDXL's table can be scaled to multiples of 128 alone; "
                "set bucketing.resolution=1024, or bucketing=aspect"
            )
        super().__post_init__()

    @cached_property
    def tiers(self) -> list[Tier]:  # type: ignore[override]
        sides = ([int(side) * self.resolution // 1024 for side in name.split("x")] for name in SDXL_TABLE.split())
        return [tuple(sorted((Bucket(*pair) for pair in sides), key=_by_aspect))]


@dataclass(frozen=True)
class SquareBucket(_Placing):
    """One square canvas for every image: the centre crop that aspect bucketing is compared with.

    max_enlarge and max_cut are those of bucketing=aspect.
    """

    resolution: Resolution
    crops: int = 1
    flip: bool = False
    max_enlarge: Enlarge | None = None
    max_cut: Cut | None = None

    merge_small = False

    @cached_property
    def tiers(self) -> list[Tier]:  # type: ignore[override]
        return [(Bucket(self.resolution, self.resolution),)]
