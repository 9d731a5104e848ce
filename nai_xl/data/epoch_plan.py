"""The epoch plan: which image stands at which position of the run, a pure function of (buckets, seed, epoch, chunk).

Each bucket is an endless stream of its images, shuffled anew for every pass, and is cut into chunks. A tail shorter
than a chunk is not dropped: the next pass continues it. Every rank derives the same plan by itself. An epoch is two
arrays, 4 bytes an image and 8 a chunk.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nai_xl.rng import hashed

Items = NDArray[np.integer[Any]]


def numbered(buckets: Sequence[Hashable]) -> NDArray[np.int64]:
    """[N] a number for each, the same for equal ones: what `by_bucket` groups."""
    seen: dict[Hashable, int] = {}
    return np.fromiter(map(seen.setdefault, buckets, count()), np.int64, len(buckets))


def by_bucket(buckets: NDArray[np.integer[Any]]) -> list[Items]:
    """The items of each bucket, in the order of the buckets' first items. buckets: [N] the number of each item's."""
    kind = np.uint32 if len(buckets) <= 2**32 else np.int64
    groups: list[Items] = [np.flatnonzero(buckets == bucket).astype(kind) for bucket in np.unique(buckets)]
    return sorted(groups, key=lambda items: int(items[0]))


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
        return sum(self._chunks_of(len(items), epoch) for items in self.buckets)

    def _chunks_of(self, size: int, epoch: int) -> int:
        """How many chunks a bucket of so many images has in the epochs 0..epoch-1."""
        return epoch * size // self.chunk

    def epoch(self, epoch: int) -> Items:
        """The items of one epoch, [chunks, chunk], in the order of training."""
        chunks, order = self._epoch(epoch)
        return chunks[order]

    def _epoch(self, epoch: int) -> tuple[Items, NDArray[np.int64]]:
        """The chunks of an epoch, bucket after bucket, and the order in which they are trained."""
        streams = [self._stream(bucket, epoch) for bucket in range(len(self.buckets))]
        return np.concatenate(streams).reshape(-1, self.chunk), self._order(epoch)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return self._generator(epoch, "chunks").permutation(self.chunks_before(epoch + 1) - self.chunks_before(epoch))

    def _stream(self, bucket: int, epoch: int) -> Items:
        """The part of a bucket's stream that becomes whole chunks in this epoch."""
        items = self.buckets[bucket]
        size = len(items)
        start, stop = (self._chunks_of(size, e) * self.chunk for e in (epoch, epoch + 1))
        part = np.empty(stop - start, items.dtype)
        for number in range(start // size, -(-stop // size)) if start < stop else ():
            shuffled = items.copy()
            self._generator(number, f"bucket {bucket}").shuffle(shuffled)
            begin, end = max(start, number * size), min(stop, (number + 1) * size)
            part[begin - start : end - start] = shuffled[begin - number * size : end - number * size]
        return part

    def _generator(self, epoch: int, purpose: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=hashed(self.seed, epoch, f"plan {purpose}")))

    def from_position(self, position: int) -> Iterator[tuple[int, Items]]:
        """Endless (position of its first sample, items [chunk]) from the chunk that holds `position` on."""
        if position % self.chunk:
            raise ValueError(f"position {position} is not at the start of a chunk of {self.chunk}")
        wanted = position // self.chunk
        for epoch in count(self._epoch_of(wanted)):
            before = self.chunks_before(epoch)
            chunks, order = self._epoch(epoch)
            for number in range(max(wanted - before, 0), len(order)):
                yield (before + number) * self.chunk, chunks[order[number]]

    def seen(self, positions: int) -> NDArray[np.int64]:
        """[buckets] how many different images of each stand in the first `positions`, whole chunks of them."""
        epoch = self._epoch_of(positions // self.chunk)
        sizes = np.array([len(items) for items in self.buckets])
        before, after = (np.array([self._chunks_of(int(size), e) for size in sizes]) for e in (epoch, epoch + 1))
        trained = self._order(epoch)[: positions // self.chunk - before.sum()]  # of this epoch's chunks
        ends = np.cumsum(after - before)
        buckets = np.searchsorted(ends, trained, side="right")
        found = np.minimum((before + np.bincount(buckets, minlength=len(sizes))) * self.chunk, sizes)
        # in the second pass over a bucket the rest of the first comes up in a chunk that need not be the first
        for bucket in np.flatnonzero(before * self.chunk < sizes).tolist() if epoch else ():
            chunks = trained[buckets == bucket] - (ends - after + before)[bucket]
            now = self._stream(bucket, epoch).reshape(-1, self.chunk)[chunks]
            met = np.zeros(int(self.buckets[bucket].max()) + 1, np.bool_)
            met[self._stream(bucket, epoch - 1)] = met[now] = True
            found[bucket] = np.count_nonzero(met)
        return found

    def _epoch_of(self, chunk_number: int) -> int:
        """The epoch that holds a chunk, by bisection."""
        low, high = 0, 1
        while self.chunks_before(high) <= chunk_number:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.chunks_before(middle) <= chunk_number else (low, middle)
        return low
