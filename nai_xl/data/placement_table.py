"""All placements of all images in arrays, for what looks at every one of them: keys, what is missing, bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nai_xl.data.bucketing import BLOCK
from nai_xl.data.keys import masks_of
from nai_xl.data.loader import Placed
from nai_xl.data.rows import Item, Rows
from nai_xl.data.shards.shard import KEY
from nai_xl.interfaces import Placement, Places


class Block(NamedTuple):
    """Images at most BLOCK at a time. sizes are those that occur, of [N] tells which an image has."""

    rows: Rows
    of: NDArray[np.intp]
    places: Places  # of the sizes

    @property
    def counts(self) -> NDArray[np.int64]:
        """[N] placements of each image."""
        return self.places.counts[self.of]

    def keys(self, made_by: bytes) -> NDArray[np.uint8]:
        """[M,16]: image after image."""
        counts, masks = self.counts, masks_of(self.places.rows, made_by)
        contents = self.rows.contents[:, :KEY]
        if (counts == 1).all():
            return contents ^ masks[self.of]
        owner = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
        first = np.cumsum(self.places.counts) - self.places.counts
        return contents[owner] ^ masks[first[self.of][owner] + within]


@dataclass(frozen=True)
class PlacementTable:
    """One row for each placement, image after image. ends: [N] where the rows of each image end.

    canvas: [N] which of `canvases` [K,2], width and height in pixels, is an image's.
    """

    parts: Sequence[Placed]
    ends: NDArray[np.int64]
    canvas: NDArray[np.int32]
    canvases: NDArray[np.int32]

    @classmethod
    def of(cls, wanted: Sequence[Placed]) -> PlacementTable:
        counts = [np.zeros(0, np.int64), *(block.counts for part in wanted for block in _blocks(part))]
        numbers, canvases = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)]
        for part in wanted:
            numbers.append(part.assigned.of + np.int32(sum(map(len, canvases))))
            canvases.append(np.array(part.assigned.buckets, np.int32).reshape(-1, 2))
        return cls(wanted, np.cumsum(np.concatenate(counts)), np.concatenate(numbers), np.concatenate(canvases))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def keys(self, made_by: bytes) -> NDArray[np.uint8]:
        """[M,16]; made_by: what all latents have in common (keys.recipe)."""
        keys, done = np.empty((len(self), KEY), np.uint8), 0
        for block in (block for part in self.parts for block in _blocks(part)):
            some = block.keys(made_by)
            keys[done : done + len(some)] = some
            done += len(some)
        return keys

    def _owners(self, which: NDArray[np.int64]) -> NDArray[np.intp]:
        return self.ends.searchsorted(which, side="right")

    def job(self, row: int) -> tuple[Item, Placement]:
        """The image and the placement of one row."""
        owner = number = int(self.ends.searchsorted(row, side="right"))
        for part in self.parts:
            if number < len(part):
                places = part.bucketing.placements(*part.rows.size(number))
                return part.rows[number], places[row - int(self.ends[owner])]
            number -= len(part)
        raise IndexError(row)

    def sides(self, which: NDArray[np.int64]) -> NDArray[np.int32]:
        """[n,2] width and height in pixels of the canvases of rows `which`."""
        return self.canvases[self.canvas[self._owners(which)]]

    def by_bucket(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows `which` of the table ordered by their canvas, and in one canvas by where the images lie."""
        width, height = self.sides(which).T
        lies = np.concatenate([np.zeros(0, np.int64), *(part.rows.lies for part in self.parts)])
        return which[np.lexsort((lies[self._owners(which)], height, width))]


def _blocks(placed: Placed) -> Iterator[Block]:
    for start in range(0, len(placed), BLOCK):
        rows = placed.rows[start : start + BLOCK]
        sizes, of = np.unique(np.ascontiguousarray(rows.sizes).view(np.int64)[:, 0], return_inverse=True)
        yield Block(rows, of, placed.bucketing.places(sizes.view(np.int32).reshape(-1, 2)))
