"""The index: which images there are, their captions, sizes and content hashes; what cannot be used, and why.

A source (nai_xl.data.source) makes it.
"""

from __future__ import annotations

import csv
import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nai_xl.errors import UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from nai_xl.diffusion.ideal import Law
    from nai_xl.interfaces import Bucket

# struct.error: Pillow, on some damaged EXIF
UNREADABLE = (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, struct.error)


class Drawn(Protocol):
    """Latents that a source makes itself, for whatever canvas; hashable."""

    def latents(self, bucket: Bucket) -> Tensor:
        """[4,h,w] float32, raw: before normalisation."""
        ...

    def law(self, bucket: Bucket) -> Law:
        """The distribution that `latents` come from, given the caption."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """One image: `size` is (width, height) as seen, after EXIF rotation; `content` hashes the file's bytes.

    `drawn`: latents without a picture. `path` is then a name and no file, and `content` hashes all that they are made
    from.
    """

    path: Path
    caption: str
    size: tuple[int, int]
    content: str
    drawn: Drawn | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    path: Path
    reason: str


@dataclass(slots=True)
class Index:
    """The usable images, ordered by their content, and the skipped ones. What is held out is not among the items."""

    items: list[Item]
    skipped: list[Skipped] = field(default_factory=list)
    held_out: list[Item] = field(default_factory=list)

    def hold_out(self, share: float) -> Index:
        """The index with about `share` of its images held out: those whose content's hash lies below it.

        So an image is held out whatever the others are and wherever it lies, and its copies with it. Raises UserError
        when nothing is left to train on.
        """
        held = [item for item in self.items if is_held_out(item, share)]
        kept = [item for item in self.items if not is_held_out(item, share)]
        if not kept:
            raise UserError(f"data.held_out={share} holds out all {len(held)} images; set a smaller share")
        return Index(kept, self.skipped, held)

    def fingerprint(self) -> str:
        """16 hex characters over every image's content and caption, whatever the folder or file is called."""
        rows = sorted(f"{item.content} {item.caption}" for item in self.items)
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]

    def without(self, unusable: dict[Path, str]) -> Index:
        """The index less the images that turned out unusable, with their reasons."""
        kept, held = ([x for x in items if x.path not in unusable] for items in (self.items, self.held_out))
        return Index(kept, [*self.skipped, *(Skipped(path, reason) for path, reason in unusable.items())], held)

    def write_skipped(self, path: Path) -> None:
        """`skipped.csv`: file, reason."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("file", "reason"))
            writer.writerows((str(skip.path), skip.reason) for skip in self.skipped)


def is_held_out(item: Item, share: float) -> bool:
    return int(item.content[:13], 16) < share * 16**13


def open_rgb(path: Path) -> Image.Image:
    """The whole image as 8-bit RGB: EXIF rotation applied, transparency laid on white, 16-bit grey scaled down.

    Raises one of UNREADABLE for a file that is not a whole image.
    """
    with Image.open(path) as file:
        file.load()
        ImageOps.exif_transpose(file, in_place=True)
        return _as_rgb(file)


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
    """open_rgb of an image that was there when the run began. Raises UserError if it has gone or been damaged since."""
    try:
        return open_rgb(item.path)
    except UNREADABLE as error:
        raise UserError(
            f"{item.path} can no longer be read ({one_line(error)}); bring it back and run the same command again"
        ) from error


def refuse_without_pictures(items: Iterable[Item], reader: str, instead: str) -> None:
    """Raise UserError where an item has latents only. reader: what needs pictures; instead: the override that helps."""
    if any(item.drawn is not None for item in items):
        raise UserError(f"{reader} needs pictures, and these data are latents without any; set {instead}")


def refuse_empty(index: Index, where: str) -> None:
    """Raise UserError if every image was skipped, with the first reasons."""
    if not index.items:
        reasons: Sequence[str] = [f"{skip.path.name}: {skip.reason}" for skip in index.skipped[:3]]
        raise UserError(f"{where}: none of {len(index.skipped)} images can be used. {'; '.join(reasons)}")
