"""Keys of cached entries: those of latents for all images at once, those of texts one by one.

A latent's key is 16 bytes: the first half of the SHA-256 of the image's bytes, XOR 128 bits mixed from the placement
and from all else that changes the latents. So it is found by array operations, without a hash over text for each image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nai_xl.data.cache import content_key
from nai_xl.data.shards.shard import KEY
from nai_xl.interfaces import Placement

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ALL = (1 << 64) - 1


def recipe(*parts: object) -> bytes:
    """16 bytes that change when any of `parts` does: what all latents of a run have in common."""
    return bytes.fromhex(content_key(*parts))[:KEY]


def numbers_of(place: Placement) -> tuple[int, ...]:
    """Bucket width and height, resized width and height, crop left and top, flip: a row of `places`."""
    return (*place.bucket, *place.resized, *place.crop, int(place.flip))


def latent_keys(contents: NDArray[np.uint8], places: NDArray[Any], made_by: bytes) -> NDArray[np.uint8]:
    """contents [N,32], places [N,7] as `numbers_of` gives them, made_by a recipe -> keys [N,16] uint8."""
    keys: NDArray[np.uint8] = contents[:, :KEY] ^ masks_of(places, made_by)
    return keys


def masks_of(places: NDArray[Any], made_by: bytes) -> NDArray[np.uint8]:
    """[N,16] by which the keys of images that are placed like this differ from their contents: mask_of, at once."""
    lanes = [_lane(int.from_bytes(made_by[half : half + 8], "big"), places) for half in (0, 8)]
    return np.stack(lanes, axis=1).astype(">u8").view(np.uint8)


def _lane(seed: int, places: NDArray[Any]) -> NDArray[np.uint64]:
    state = np.full(len(places), seed, np.uint64)
    for column in np.asarray(places, np.uint64).T:
        state = _splitmix(state ^ column)
    return state


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64; Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17."""
    x = x + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=1 << 16)  # images of one size are placed alike
def mask_of(place: Placement, made_by: bytes) -> int:
    """128 bits by which the keys of all images differ from their contents, if they are placed like this."""
    lanes = []
    for half in (0, 8):
        state = int.from_bytes(made_by[half : half + 8], "big")
        for number in numbers_of(place):
            x = (state ^ number) + GOLDEN & ALL
            x = (x ^ x >> 30) * FIRST & ALL
            x = (x ^ x >> 27) * SECOND & ALL
            state = x ^ x >> 31
        lanes.append(state)
    return lanes[0] << 64 | lanes[1]


def latent_key(content: str, place: Placement, made_by: bytes) -> str:
    """The key of one image, as 32 hex characters. content: the hex SHA-256 of its bytes."""
    return f"{int(content[: 2 * KEY], 16) ^ mask_of(place, made_by):032x}"


@dataclass(frozen=True)
class TextKeys:
    """The key of any text, as 32 hex characters.

    made_by: what all texts of a run have in common. count: distinct texts that were encoded.
    """

    made_by: str
    count: int = 0

    def __call__(self, text: str) -> str:
        return content_key(self.made_by, text)[: 2 * KEY]
