"""All placements of all images in arrays, for what looks at every one of them: keys, what is missing, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nai_xl.data.keys import latent_keys, numbers_of
from nai_xl.data.loader import Placed
from nai_xl.data.rows import Item, Rows
from nai_xl.interfaces import Placement


@dataclass(frozen=True)
class PlacementTable:
    """owner: [M] number of the image, counted through `rows`. place: [M] which of `every` placement it has.

    places: [P,7] every placement as numbers (keys.numbers_of).
    """

    rows: Sequence[Rows]
    owner: NDArray[np.int32]
    place: NDArray[np.int32]
    every: Sequence[Placement]
    places: NDArray[np.int32]

    @classmethod
    def of(cls, wanted: Sequence[Placed]) -> PlacementTable:
        """Image after image. Images of one size are placed alike."""
        every: list[Placement] = []
        owners, places, before = [], [], 0
        for placed in wanted:
            sizes, kinds = np.unique(placed.rows.sizes, axis=0, return_inverse=True)
            rows = [placed.bucketing.placements(width, height) for width, height in sizes.tolist()]
            first = len(every) + np.cumsum([0, *map(len, rows)])
            counts = np.diff(first)[kinds.reshape(-1)]
            owner = np.repeat(np.arange(len(counts)), counts)
            within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            places.append((first[kinds.reshape(-1)][owner] + within).astype(np.int32))
            owners.append((owner + before).astype(np.int32))
            every += [place for row in rows for place in row]
            before += len(counts)
        numbers = np.array([numbers_of(place) for place in every], np.int32).reshape(-1, 7)
        none = np.zeros(0, np.int32)
        table = [part.rows for part in wanted]
        return cls(table, np.concatenate([none, *owners]), np.concatenate([none, *places]), every, numbers)

    def __len__(self) -> int:
        return len(self.owner)

    def keys(self, made_by: bytes) -> NDArray[np.uint8]:
        """[M,16]; made_by: what all latents have in common (keys.recipe)."""
        contents = np.concatenate([np.zeros((0, 32), np.uint8), *(rows.contents for rows in self.rows)])
        return latent_keys(contents[self.owner], self.places[self.place], made_by)

    def job(self, row: int) -> tuple[Item, Placement]:
        """The image and the placement of one row."""
        number = int(self.owner[row])
        for rows in self.rows:
            if number < len(rows):
                return rows[number], self.every[self.place[row]]
            number -= len(rows)
        raise IndexError(row)

    def pixels(self) -> NDArray[np.int64]:
        """[M] of the canvas of each."""
        return (self.places[:, 0].astype(np.int64) * self.places[:, 1])[self.place]

    def by_bucket(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows `which` of the table ordered by their canvas, and in one canvas by where the images lie."""
        width, height = self.places[self.place[which], :2].T
        lies = np.concatenate([np.zeros(0, np.int64), *(rows.lies for rows in self.rows)])
        return which[np.lexsort((lies[self.owner[which]], height, width))]
