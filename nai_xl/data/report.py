"""What a bucketing does to the images: the report before training, and what its limits leave out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nai_xl.data.bucketing import BLOCK
from nai_xl.data.epoch_plan import EpochPlan
from nai_xl.data.index import Index
from nai_xl.data.rows import Rows
from nai_xl.interfaces import Bucket, Bucketing

Array = NDArray[np.float64]
SHOWN = 12  # buckets in a line of words
MUCH, MOST = 2.0, 0.5  # an enlargement, and a share cut away, that a person should know of


def enlarged_and_cut(bucketing: Bucketing, sizes: NDArray[np.int32]) -> tuple[NDArray[np.uint16], Array, Array]:
    """[N] each: the place of the image's canvas, by which factor it is enlarged, the share of its area cut away."""
    numbers = bucketing.buckets_of(sizes)
    canvases = np.array(bucketing.buckets)[numbers]
    factor = (canvases / sizes).max(1)
    kept = canvases.prod(1) / (sizes.prod(1, dtype=np.int64) * factor * factor)
    return numbers, factor, np.maximum(1 - kept, 0)


def within(index: Index, bucketing: Bucketing) -> Index:
    """The index without the images beyond max_enlarge and max_cut, which are skipped with that reason."""
    if bucketing.max_enlarge is None and bucketing.max_cut is None:
        return index
    return index.without(dict(_beyond(index.items, bucketing)) | dict(_beyond(index.held_out, bucketing)))


def _beyond(items: Rows, bucketing: Bucketing) -> Iterator[tuple[Any, str]]:
    """Path and reason of each image beyond a limit."""
    most, largest = bucketing.max_enlarge or np.inf, 1.0 if bucketing.max_cut is None else bucketing.max_cut
    _, factor, cut = enlarged_and_cut(bucketing, items.sizes)
    for number in np.flatnonzero((factor > most) | (cut > largest)).tolist():
        if factor[number] > most:
            reason = f"would be enlarged {factor[number]:.3g} times; bucketing.max_enlarge={most:g}"
        else:
            reason = f"would lose {cut[number]:.1%} of its area; bucketing.max_cut={largest:g}"
        yield items[number].path, reason


@dataclass(frozen=True)
class Report:
    """The canvases that are used, and how images land on them. enlarged, much: images that are enlarged at all, and
    more than twofold; cut, most: the mean share of an image's area that is cut away, and images that lose more than
    half.
    """

    buckets: Sequence[Bucket]  # by aspect, then by area
    counts: NDArray[np.int64]  # [B] images
    cuts: Array  # [B] mean share cut away
    largest_cut: float
    most: int
    enlarged: int
    much: int
    largest_factor: float

    @property
    def images(self) -> int:
        return int(self.counts.sum())

    @property
    def cut(self) -> float:
        return float((self.counts * self.cuts).sum() / max(self.images, 1))

    def rows(self) -> Mapping[str, str]:
        """Rows of the table that a run begins with."""
        order = np.argsort(-self.counts, kind="stable")
        words = [f"{self.counts[i]} in {self.buckets[i].name}" for i in order[:SHOWN]]
        more = f", and {len(order) - SHOWN} more" if len(order) > SHOWN else ""
        cut = f"{self.cut:.1%} of a picture in the mean, {self.largest_cut:.1%} at most"
        if self.most:
            cut += f"; more than half of {self.most}: bucketing.max_cut={MOST} leaves such out"
        enlarged = "none"
        if self.enlarged:
            enlarged = f"{self.enlarged} of {self.images} images, up to {self.largest_factor:.3g} times"
        if self.much:
            enlarged += f"; {self.much} more than twofold: bucketing.max_enlarge={MUCH:g} leaves such out"
        return {"buckets": ", ".join(words) + more, "cut away": cut, "enlarged": enlarged}


def report(bucketing: Bucketing, sizes: NDArray[np.int32]) -> Report:
    """Of the images of these sizes, [N,2]."""
    length = len(bucketing.buckets)
    counts, cuts = np.zeros(length, np.int64), np.zeros(length)
    largest, enlarged, much, most = np.array([0.0, 1.0]), 0, 0, 0
    for start in range(0, len(sizes), BLOCK):
        numbers, factor, cut = enlarged_and_cut(bucketing, sizes[start : start + BLOCK])
        counts += np.bincount(numbers, minlength=length)
        cuts += np.bincount(numbers, cut, length)
        largest = np.maximum(largest, [cut.max(), factor.max()])
        enlarged += int(np.count_nonzero(factor > 1))
        much += int(np.count_nonzero(factor > MUCH))
        most += int(np.count_nonzero(cut > MOST))
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda i: _aspect_and_area(bucketing.buckets[i]))
    buckets = [bucketing.buckets[i] for i in order]
    shares = cuts[order] / counts[order]
    return Report(buckets, counts[order], shares, float(largest[0]), most, enlarged, much, float(largest[1]))


def _aspect_and_area(bucket: Bucket) -> tuple[float, int]:
    return bucket.width / bucket.height, bucket.width * bucket.height


def unseen(plan: EpochPlan, positions: int, *, merges: bool) -> Iterable[tuple[str, str]]:
    """A row on the images that a run of so many positions does not see, if there are any.

    merges: whether small buckets have been merged.
    """
    missing = np.array([len(items) for items in plan.buckets]) - plan.seen(positions)
    count, images = int(missing.sum()), plan.images
    if not count:
        return
    words = f"{count} of {images} images ({count / images:.0%}) in this run of {positions}"
    small = sum(1 for items, lacks in zip(plan.buckets, missing, strict=True) if lacks and len(items) < plan.chunk)
    if small and not merges:
        words += (
            f"; {small} of {len(plan.buckets)} buckets hold fewer than a chunk of {plan.chunk}: "
            "bucketing.merge_small=true puts their images into the nearest that hold more"
        )
    yield "not seen", words
