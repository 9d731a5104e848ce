"""The epoch plan: which image stands at which position of the run, a pure function of (buckets, seed, epoch, chunk).

Each bucket is an endless stream of its images, shuffled anew for every pass, and is cut into chunks. A tail shorter
than a chunk is not dropped: the next pass continues it. Every rank derives the same plan by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nai_xl.rng import hashed

Items = NDArray[np.int64]


def by_bucket(buckets: Sequence[Hashable]) -> list[Items]:
    """The items of each bucket, in the order of the buckets' first items."""
    if not buckets:
        return []
    seen: dict[Hashable, int] = {}
    first = np.fromiter(
        map(seen.setdefault, buckets, itertools.count()), np.int64, len(buckets)
    )  # of each item's bucket
    order = np.argsort(first, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(first[order])) + 1)


@dataclass(frozen=True)
class EpochPlan:
    """`buckets[b]` lists the items of bucket b. Positions run on over epochs; `chunk` of them share a bucket."""

    buckets: Sequence[Items]
    seed: int
    chunk: int

    @property
    def images(self) -> int:
        return sum(map(len, self.buckets))

    def chunks_before(self, epoch: int) -> int:
        """How many chunks the epochs 0..epoch-1 hold."""
        return sum(epoch * len(items) // self.chunk for items in self.buckets)

    def epoch(self, epoch: int) -> Items:
        """The items of one epoch, [chunks, chunk], in the order of training."""
        rows = [self._stream(b, epoch) for b in range(len(self.buckets))]
        chunks = np.concatenate([row.reshape(-1, self.chunk) for row in rows])
        return chunks[self._permutation(len(chunks), epoch, "chunks")]

    def _stream(self, bucket: int, epoch: int) -> Items:
        """The part of a bucket's stream that becomes whole chunks in this epoch."""
        items = self.buckets[bucket]
        count = len(items)
        start, stop = (e * count // self.chunk * self.chunk for e in (epoch, epoch + 1))
        if start == stop:
            return items[:0]
        first = start // count
        passes = [items[self._permutation(count, p, f"bucket {bucket}")] for p in range(first, -(-stop // count))]
        return np.concatenate(passes)[start - first * count : stop - first * count]

    def _permutation(self, count: int, epoch: int, purpose: str) -> Items:
        key = hashed(self.seed, epoch, f"plan {purpose}")
        return np.random.Generator(np.random.Philox(key=key)).permutation(count)

    def from_position(self, position: int) -> Iterator[tuple[int, Items]]:
        """Endless (position of its first sample, items [chunk]) from the chunk that holds `position` on."""
        if position % self.chunk:
            raise ValueError(f"position {position} is not at the start of a chunk of {self.chunk}")
        wanted = position // self.chunk
        epoch = self._epoch_of(wanted)
        number = self.chunks_before(epoch)
        while True:
            for items in self.epoch(epoch):
                if number >= wanted:
                    yield number * self.chunk, items
                number += 1
            epoch += 1

    def _epoch_of(self, chunk_number: int) -> int:
        """The epoch that holds a chunk, by bisection."""
        low, high = 0, 1
        while self.chunks_before(high) <= chunk_number:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.chunks_before(middle) <= chunk_number else (low, middle)
        return low
