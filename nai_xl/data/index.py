"""The index: which images there are, their captions, sizes and content hashes; what cannot be used, and why."""

from __future__ import annotations

import csv
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nai_xl.errors import UserError, one_line

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# struct.error: Pillow, on some damaged EXIF
UNREADABLE = (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, struct.error)


@dataclass(frozen=True, slots=True)
class Item:
    """One image: `size` is (width, height) as seen, after EXIF rotation; `content` hashes the file's bytes."""

    path: Path
    caption: str
    size: tuple[int, int]
    content: str


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
        held = [item for item in self.items if int(item.content[:13], 16) < share * 16**13]
        kept = [item for item in self.items if int(item.content[:13], 16) >= share * 16**13]
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


def open_rgb(path: Path) -> Image.Image:
    """The whole image as 8-bit RGB: EXIF rotation applied, transparency laid on white, 16-bit grey scaled down.

    Raises one of UNREADABLE for a file that is not a whole image.
    """
    with Image.open(path) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):
        # Pillow would clip 16-bit grey at 255
        return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _seen_size(path: Path) -> tuple[int, int]:
    """Width and height after EXIF rotation, from the header alone."""
    with Image.open(path) as file:
        turned = file.getexif().get(0x0112) in (5, 6, 7, 8)
        return (file.height, file.width) if turned else file.size


def _read_item(path: Path, min_side: int) -> Item | Skipped:
    text = path.with_suffix(".txt")
    try:
        caption = text.read_text(encoding="utf-8-sig").strip()  # Windows editors begin with a mark
    except FileNotFoundError:
        return Skipped(path, f"no caption file {text.name}")
    except UnicodeDecodeError:
        return Skipped(path, f"caption file {text.name} is not UTF-8")
    except OSError as error:
        return Skipped(path, f"caption file {text.name} cannot be read: {one_line(error)}")
    try:
        size = _seen_size(path)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    except UNREADABLE as error:
        return Skipped(path, f"not a readable image: {one_line(error)}")
    if min(size) < min_side:
        return Skipped(path, f"{size[0]}x{size[1]} pixels; data.min_side is {min_side}")
    return Item(path, caption, size, content)


def _image_files(folder: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(folder):
        names.sort()
        yield from (Path(directory, name) for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES)


def scan(folder: Path, *, min_side: int) -> Index:
    """Read every image's header and caption below `folder`. Raises UserError when nothing usable is there."""
    paths = list(_image_files(folder))
    if not paths:
        raise UserError(
            f"data.dir={folder}: no images (jpg, png, webp) in this folder. Set data.dir to a folder of images, each "
            "with a caption in a .txt file of the same name."
        )
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda path: _read_item(path, min_side), paths))
    # by content, so that a renamed file does not change which image stands where in the run
    items = sorted((x for x in found if isinstance(x, Item)), key=lambda item: (item.content, item.caption))
    index = Index(items, [x for x in found if isinstance(x, Skipped)])
    refuse_empty(index, f"data.dir={folder}")
    return index


def refuse_empty(index: Index, where: str) -> None:
    """Raise UserError if every image was skipped, with the first reasons."""
    if not index.items:
        reasons: Sequence[str] = [f"{skip.path.name}: {skip.reason}" for skip in index.skipped[:3]]
        raise UserError(f"{where}: none of {len(index.skipped)} images can be used. {'; '.join(reasons)}")
