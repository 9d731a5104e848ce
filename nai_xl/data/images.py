"""Pictures: read as they are meant to be seen, on their canvases, and as numbers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from nai_xl.data.rows import Item
from nai_xl.errors import UserError, one_line
from nai_xl.interfaces import Placement

# struct.error: Pillow, on some damaged EXIF
UNREADABLE = (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, struct.error)


def picture(item: Item) -> Image.Image:
    """open_rgb of an image's bytes, wherever they lie."""
    with item.open() as file:
        return open_rgb(file)


def open_rgb(file: Path | BinaryIO) -> Image.Image:
    """The whole image as 8-bit RGB: EXIF rotation applied, transparency laid on white, 16-bit grey scaled down.

    Raises one of UNREADABLE for a file that is not a whole image.
    """
    with Image.open(file) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _as_rgb(image)


def _as_rgb(image: Image.Image) -> Image.Image:
    """A picture of its own, even of one that is RGB already."""
    if image.mode.startswith(("I", "F")):
        # Pillow would clip 16-bit grey at 255
        return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def reopen(item: Item) -> Image.Image:
    """The picture of an image that was there when the run began. Raises UserError if it is gone or damaged now."""
    try:
        return picture(item)
    except UNREADABLE as error:
        raise UserError(
            f"{item.path} can no longer be read ({one_line(error)}); bring it back and run the same command again"
        ) from error


def on_canvas(image: Image.Image, placement: Placement) -> Image.Image:
    """The image resized, cut and, where the placement says so, mirrored."""
    left, top = placement.crop
    box = (left, top, left + placement.bucket.width, top + placement.bucket.height)
    canvas = image.resize(placement.resized, Image.Resampling.LANCZOS).crop(box)
    return ImageOps.mirror(canvas) if placement.flip else canvas


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as [3,H,W] float32 in [-1,1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
