"""Bodies in a picture: connected regions that stand out from the background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SMALLEST = (
    1 / 400
)  # of the canvas; anything smaller is a speck. The smallest bodies of data=shapes are five times as large
SIDES_AND_CORNERS = np.ones((3, 3))  # the neighbours that a pixel is connected to


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
    labels, _ = ndimage.label(distance > threshold, SIDES_AND_CORNERS)
    sizes = np.bincount(labels.ravel())
    large = np.flatnonzero(sizes > SMALLEST * labels.size)
    large = large[large > 0]  # 0 is the background
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return Bodies(len(large), int(np.isin(large, border).sum()))
