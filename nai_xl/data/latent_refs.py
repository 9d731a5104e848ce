"""Which cache entry holds each placement of each image: nothing is kept for an image but the number of its size."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from nai_xl.data.index import Item
from nai_xl.data.keys import latent_key, latent_keys, mask_of, numbers_of
from nai_xl.data.loader import LatentRef
from nai_xl.interfaces import Bucket, Bucketing, Placement


@dataclass(frozen=True)
class LatentRefs(Sequence[Sequence[LatentRef]]):
    """One row of placements an image, made when it is asked for. Images of one size are placed alike.

    contents: [N,32] uint8, SHA-256 of each image's bytes. kinds: [N], which of `placements` an image has. made_by: what
    all latents have in common (keys.recipe).
    """

    contents: NDArray[np.uint8]
    kinds: NDArray[np.int32]
    placements: Sequence[Sequence[Placement]]
    made_by: bytes

    @classmethod
    def of(
        cls, contents: NDArray[np.uint8], sizes: NDArray[np.int32], bucketing: Bucketing, made_by: bytes
    ) -> LatentRefs:
        """sizes: [N,2], width and height."""
        kinds, which = np.unique(sizes, axis=0, return_inverse=True)
        placements = [tuple(bucketing.placements(int(width), int(height))) for width, height in kinds]
        return cls(contents, which.reshape(-1).astype(np.int32), placements, made_by)

    def __len__(self) -> int:
        return len(self.kinds)

    @overload
    def __getitem__(self, number: int) -> Sequence[LatentRef]: ...
    @overload
    def __getitem__(self, number: slice) -> LatentRefs: ...
    def __getitem__(self, number: int | slice) -> Sequence[LatentRef] | LatentRefs:
        if isinstance(number, slice):
            return LatentRefs(self.contents[number], self.kinds[number], self.placements, self.made_by)
        content = self.contents[number].tobytes().hex()
        return [LatentRef(latent_key(content, mask), place) for place, mask in self._masked[self.kinds[number]]]

    @cached_property
    def _masked(self) -> list[list[tuple[Placement, int]]]:
        return [[(place, mask_of(place, self.made_by)) for place in row] for row in self.placements]

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        """[K+1] where the placements of each kind begin in a list of all."""
        return np.cumsum([0, *map(len, self.placements)])

    @property
    def buckets(self) -> set[Bucket]:
        return {place.bucket for kind in np.unique(self.kinds) for place in self.placements[kind]}

    def table(self) -> RefTable:
        """All placements of all images, row after row."""
        first, counts = self._first, np.diff(self._first)[self.kinds]
        owner = np.repeat(np.arange(len(self), dtype=np.int32), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        every = [place for row in self.placements for place in row]
        places = np.array([numbers_of(place) for place in every], np.int32).reshape(-1, 7)
        return RefTable(self, owner, (first[self.kinds][owner] + within).astype(np.int32), every, places)


@dataclass(frozen=True)
class RefTable:
    """owner: [M] number of the image. place: [M] which of `every` placement it has. places: [P,7] these as numbers."""

    refs: LatentRefs
    owner: NDArray[np.int32]
    place: NDArray[np.int32]
    every: Sequence[Placement]
    places: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.owner)

    def keys(self) -> NDArray[np.uint8]:
        """[M,16]."""
        return latent_keys(self.refs.contents[self.owner], self.places[self.place], self.refs.made_by)

    def pixels(self) -> NDArray[np.int64]:
        """[M] of the canvas of each."""
        return (self.places[:, 0].astype(np.int64) * self.places[:, 1])[self.place]

    def by_bucket(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows `which` of the table ordered by their canvas, and in one canvas as they were."""
        width, height = self.places[self.place[which], :2].T
        return which[np.lexsort((height, width))]


def contents_of(items: Iterable[Item]) -> NDArray[np.uint8]:
    """[N,32] of the items' hashes; of one that is no SHA-256, as a plug-in's source may have it, its own hash."""
    return np.frombuffer(b"".join(_hashed(item.content) for item in items), np.uint8).reshape(-1, 32)


def _hashed(content: str) -> bytes:
    if re.fullmatch("[0-9a-f]{64}", content):
        return bytes.fromhex(content)
    return hashlib.sha256(content.encode()).digest()
