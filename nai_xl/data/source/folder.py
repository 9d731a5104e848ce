"""data=folder: a folder of images, each with its caption in a .txt file of the same name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import AfterValidator, Field

from nai_xl.data.images import UNREADABLE
from nai_xl.data.index import Index, Skipped, refuse_empty
from nai_xl.data.rows import Item
from nai_xl.data.scan_cache import ScanCache
from nai_xl.data.source import Share
from nai_xl.errors import UserError, one_line

SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
PART = 64  # files that a thread reads at a time


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError("no such folder; give a folder of images, each with a caption in a .txt file of the same name")
    return path


@dataclass(frozen=True)
class FolderSource:
    """A folder, searched recursively, of jpg, png and webp images with same-name .txt captions.

    `held_out` is the share of them that is never trained on, for evaluators. Images of more than `max_megapixels`
    million pixels, which take 8 MB of memory for each million while they are read, and those with a caption file of
    more than `max_caption` bytes are skipped, and listed with the rest.
    """

    dir: Annotated[Path, AfterValidator(_existing)]
    min_side: int = 16
    held_out: Share = 0.0
    max_megapixels: Annotated[float, Field(gt=0)] = 100.0
    max_caption: Annotated[int, Field(ge=1)] = 65536

    def scan(self) -> Index:
        found = scan(self.dir, min_side=self.min_side, max_megapixels=self.max_megapixels, max_caption=self.max_caption)
        return found.hold_out(self.held_out)


@dataclass(frozen=True)
class Limits:
    """What is skipped: a smaller side in pixels, more million pixels, more bytes of a caption file."""

    min_side: int
    max_megapixels: float
    max_caption: int


def scan(folder: Path, *, min_side: int, max_megapixels: float = 100.0, max_caption: int = 65536) -> Index:
    """Every image below `folder` with its caption. What an earlier scan read and is unchanged is not opened again.

    Raises UserError when nothing usable is there.
    """
    limits = Limits(min_side, max_megapixels, max_caption)
    files = list(_image_files(folder))
    if not files:
        raise UserError(
            f"data.dir={folder}: no images (jpg, png, webp) in this folder. Set data.dir to a folder of images, each "
            "with a caption in a .txt file of the same name."
        )
    Image.MAX_IMAGE_PIXELS = None  # in place of Pillow's limit, which nobody can raise, there is max_megapixels
    known = ScanCache.of(folder)
    with ThreadPoolExecutor() as pool:  # in parts: a task each would cost more than looking at an unchanged file
        parts = pool.map(
            lambda part: [_read_item(file, limits, known) for file in part],
            (files[start : start + PART] for start in range(0, len(files), PART)),
        )
        found = list(chain.from_iterable(parts))
    known.save()
    # by content, so that a renamed file does not change which image stands where in the run
    items = sorted((x for x in found if isinstance(x, Item)), key=lambda item: (item.content, item.caption))
    index = Index(items, [x for x in found if isinstance(x, Skipped)])
    refuse_empty(index, f"data.dir={folder}")
    return index


def _image_files(folder: Path) -> Iterator[str]:
    for directory, names, files in os.walk(folder):
        names.sort()
        for name in sorted(files):
            stem, _, suffix = name.rpartition(".")
            if stem and suffix.lower() in SUFFIXES:
                yield os.path.join(directory, name)  # noqa: PTH118 - a Path each costs as much as the scan


def _read_item(file: str, limits: Limits, known: ScanCache) -> Item | Skipped:
    path, text = Path(file), file[: file.rindex(".")] + ".txt"
    try:
        if (size := os.stat(text).st_size) > limits.max_caption:  # noqa: PTH116 - a Path costs twice as much
            return Skipped(path, f"caption file of {size} bytes; data.max_caption is {limits.max_caption}")
        caption = known.facts(text, _caption)
    except FileNotFoundError:
        return Skipped(path, f"no caption file {Path(text).name}")
    except UnicodeDecodeError:
        return Skipped(path, f"caption file {Path(text).name} is not UTF-8")
    except OSError as error:
        return Skipped(path, f"caption file {Path(text).name} cannot be read: {one_line(error)}")
    try:
        width, height, content = known.facts(file, _picture).split()
    except UNREADABLE as error:
        return Skipped(path, f"not a readable image: {one_line(error)}")
    side = int(width), int(height)
    if min(side) < limits.min_side:
        return Skipped(path, f"{width}x{height} pixels; data.min_side is {limits.min_side}")
    if side[0] * side[1] > limits.max_megapixels * 1e6:
        return Skipped(path, f"{width}x{height} pixels; data.max_megapixels is {limits.max_megapixels:g}")
    return Item(path, caption, side, content)


def _picture(file: str) -> str:
    """Width and height after EXIF rotation, from the header alone, and the content's hash."""
    with Image.open(file) as image:
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
        size = (image.height, image.width) if turned else image.size
    return f"{size[0]} {size[1]} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"


def _caption(file: str) -> str:
    return Path(file).read_text(encoding="utf-8-sig").strip()  # Windows editors begin with a mark
