"""Bodies in a picture: connected regions that stand out from the background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALLEST = 1 / 400  # of the canvas: less is a speck. The smallest bodies of data=shapes take five times that


@dataclass(frozen=True)
class Bodies:
    """How many there are, and how many of them touch the border."""

    count: int
    cut: int


def find_bodies(pixels: NDArray[np.uint8], threshold: float) -> Bodies:
    """Count the bodies of [H, W, 3].

    The background is the median colour of the outermost pixels. A body is a region, connected over sides and corners,
    of pixels whose distance from it in RGB exceeds `threshold`, larger than a speck.
    """
    values = pixels.astype(np.float64)
    rim = np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
    distance = np.linalg.norm(values - np.median(rim, axis=0), axis=2)
    labels = label(distance > threshold)
    sizes = np.bincount(labels.ravel())
    large = np.flatnonzero(sizes > SMALLEST * labels.size)
    large = large[large > 0]  # 0 is the background
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return Bodies(len(large), int(np.isin(large, border).sum()))


def label(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[H, W] -> 0 outside of `mask`, and inside it a number for each 8-connected region.

    Every pixel takes the least number around it until nothing changes; numbers jump along the chains that result, so
    that long regions do not take as many rounds as they are long (Shiloach and Vishkin's algorithm on an image).
    """
    height, width = mask.shape
    outside = height * width
    parent = np.append(np.where(mask, np.arange(outside).reshape(mask.shape), outside), outside)
    inside = np.flatnonzero(mask)
    while True:
        least = _least_around(parent[:-1].reshape(mask.shape)).ravel()[inside]
        before = parent[inside]
        np.minimum.at(parent, before, least)  # the region's number learns what any of its pixels has seen
        parent[inside] = np.minimum(parent[inside], least)
        parent[inside] = parent[parent[inside]]
        if (parent[inside] == before).all():
            break
    labels = np.zeros(outside, np.int64)
    labels[inside] = np.unique(parent[inside], return_inverse=True)[1] + 1
    return labels.reshape(mask.shape)


def _least_around(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least of each 3 x 3 neighbourhood."""
    padded = np.pad(values, 1, constant_values=values.size)
    across = np.minimum(np.minimum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    return np.minimum(np.minimum(across[:-2], across[1:-1]), across[2:])
