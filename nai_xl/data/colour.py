"""Colour profiles: from what a picture's numbers mean to sRGB, which autoencoders and screens take them for."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms

LEVELS = np.linspace(0, 255, 6).round().astype(np.uint8)  # of each channel, in the colours that a profile is tried on
NOTICED = 2  # of 255: profiles that move no colour by more are sRGB, of which there are many variants
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # ICC.1:2022, 7.2.6 -> Pillow's mode


class Profile(IntEnum):
    """What the colour profile of a picture does to it. NONE: there is none, or it is sRGB."""

    NONE = 0
    CONVERTED = 1
    DAMAGED = 2  # or for other pictures: ignored


def profile_of(image: Image.Image) -> Profile:
    """Known from the file's header alone."""
    found = _conversion(image.info.get("icc_profile") or b"", image.mode)
    return found if isinstance(found, Profile) else Profile.CONVERTED


def to_srgb(image: Image.Image, info: dict[Any, Any], mode: Literal["RGB", "RGBA"] = "RGB") -> Image.Image:
    """The picture in `mode`, always a copy, by the profile in `info`. Without one, its numbers are left as they are."""
    found = _conversion(info.get("icc_profile") or b"", image.mode)
    if isinstance(found, Profile):
        return image.convert(mode)
    space, transform = found
    converted = ImageCms.applyTransform(image.convert(space), transform)
    if converted is None:  # only in place
        raise ValueError("no picture")
    if mode == "RGBA":
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


@lru_cache(64)
def _conversion(profile: bytes, mode: str) -> Profile | tuple[str, ImageCms.ImageCmsTransform]:
    """The mode that the profile is for, and what converts it; or why there is nothing to convert."""
    if not profile:
        return Profile.NONE
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = SPACES[source.profile.xcolor_space.strip()]
        if not _fits(space, mode):
            return Profile.DAMAGED
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            space,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError, KeyError, ValueError, TypeError):
        return Profile.DAMAGED
    return Profile.NONE if space != "CMYK" and _is_srgb(space, transform) else (space, transform)


def _fits(space: str, mode: str) -> bool:
    """Whether a picture of this mode can have a profile of that space. Grey ones often have the profile of RGB."""
    grey = mode[0] in "1LIF"
    return {"RGB": mode not in ("CMYK", "LAB", "YCbCr", "HSV"), "L": grey, "CMYK": mode == "CMYK"}[space]


def _is_srgb(space: str, transform: ImageCms.ImageCmsTransform) -> bool:
    """By what it does: names are often missing or wrong."""
    if space == "L":
        tried = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        tried = Image.fromarray(np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS), -1).reshape(1, -1, 3))
    moved = ImageCms.applyTransform(tried, transform)
    before = np.asarray(tried.convert("RGB"), np.int16)
    return bool(np.abs(np.asarray(moved, np.int16) - before).max() <= NOTICED)
