"""Pictures: read as they are meant to be seen, on their canvases, and as numbers."""

from __future__ import annotations

import hashlib
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from nai_xl.data.colour import Profile, profile_of, to_srgb
from nai_xl.data.rows import Item
from nai_xl.errors import UserError, one_line
from nai_xl.interfaces import Placement

# struct.error: Pillow, on some damaged EXIF
UNREADABLE = (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, struct.error)
HEIF = find_spec("pillow_heif") is not None
SUFFIXES = frozenset(
    "apng avif avifs bmp dib gif heic heif hif j2c j2k jfif jp2 jpe jpeg jpf jpg jpx pbm pgm png pnm ppm qoi tga tif "
    "tiff webp".split()
)
"""Of files that are opened, in small letters. What a file is tells its content."""
FORMATS = "AVIF BMP DIB GIF JPEG JPEG2000 PNG PPM QOI TGA TIFF WEBP".split()  # not EPS: it runs a program
READER = f"Pillow {PIL.__version__}" + (" with HEIF" if HEIF else "")
TEXT = 64 << 20  # bytes of text in a PNG, in one place and altogether: generators of images write megabytes
LATE = 250_000_000  # pixels: larger PNGs are not decoded for an EXIF rotation that stands behind them

PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = TEXT, TEXT
Image.MAX_IMAGE_PIXELS = None  # in place of Pillow's limit, which nobody can raise, there is max_megapixels
if HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")


def why(error: Exception) -> str:
    """Of one of UNREADABLE, in a line. Pillow names the object that it could not identify, and not what is wrong."""
    if isinstance(error, UnidentifiedImageError):
        return "its content is damaged, or of no kind that is read here"
    return one_line(error)


class Looked(NamedTuple):
    """What an index keeps of a picture. width, height in pixels, after EXIF rotation; content: SHA-256 of the bytes."""

    width: int
    height: int
    content: bytes
    profile: Profile


def look(file: BinaryIO) -> Looked:
    """Of a seekable file, read to its end; of the picture, only the header. Raises one of UNREADABLE."""
    with Image.open(file, formats=FORMATS) as image:
        turned = _exif(image, file).get(0x0112) in (5, 6, 7, 8)
        width, height = image.size[::-1] if turned else image.size
        profile = profile_of(image)
    return Looked(width, height, _digest(file), profile)


def _exif(image: Image.Image, file: BinaryIO) -> Image.Exif:
    """Pillow decodes a whole PNG for it, since it may stand behind the pixels, which it hardly ever does."""
    late = image.format != "PNG" or (_has_late_chunks(file) and image.width * image.height <= LATE)
    return image.getexif() if late else Image.Image.getexif(image)


def _has_late_chunks(file: BinaryIO) -> bool:
    """Whether a PNG has chunks of its own behind the first one with pixels; PNG specification, 3rd edition, 5.3."""
    before, seen = file.tell(), False
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if seen and kind not in (b"IDAT", b"fcTL", b"fdAT", b"IEND"):
            break
        seen |= kind == b"IDAT"
        file.seek(length + 4, 1)
    file.seek(before)
    return len(head) == 8


def _digest(file: BinaryIO) -> bytes:
    file.seek(0)
    whole = hashlib.sha256()
    while block := file.read(1 << 20):
        whole.update(block)
    return whole.digest()


def picture(item: Item) -> Image.Image:
    """open_rgb of an image's bytes, wherever they lie."""
    with item.open() as file:
        return open_rgb(file)


def open_rgb(file: Path | BinaryIO) -> Image.Image:
    """The whole image as 8-bit sRGB: EXIF rotation applied, colours converted from the profile that the file brings,
    transparency laid on white, 16-bit grey scaled down; of an animation, the first picture.

    Raises one of UNREADABLE for a file that is not a whole image.
    """
    with Image.open(file, formats=FORMATS) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _as_rgb(image)


def _as_rgb(image: Image.Image) -> Image.Image:
    """A picture of its own, even of one that is RGB already."""
    if image.mode.startswith(("I", "F")):
        # Pillow would clip 16-bit grey at 255
        grey = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
        return to_srgb(grey, image.info)
    if image.has_transparency_data:
        image = to_srgb(image, image.info, "RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return to_srgb(image, image.info)


def reopen(item: Item) -> Image.Image:
    """The picture of an image that was there when the run began. Raises UserError if it is gone or damaged now."""
    try:
        return picture(item)
    except UNREADABLE as error:
        raise UserError(
            f"{item.path} can no longer be read ({why(error)}); bring it back and run the same command again"
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
