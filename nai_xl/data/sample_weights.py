"""Sample weights: how much the loss of each image counts."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from nai_xl.data.index import Index
from nai_xl.data.rows import Rows
from nai_xl.errors import UserError

GENERAL = "general"  # the class of tags that no class file names
BLOCK = 1 << 18  # captions that are split at once
Array = NDArray[np.float64]
Positive = Annotated[float, Field(gt=0)]


def equal(index: Index) -> Tensor:
    """[N] float32, 1 for every image."""
    return torch.ones(len(index.items))


@dataclass(frozen=True)
class Tags:
    """[N] float32 with mean 1: images with rare tags count more. After NovelAI Diffusion V3's tag-based loss weighting
    (2409.15997), which scales the loss by how over- or under-represented an image's tags are, class by class (artist,
    character, copyright, general). The report tells it in words; the formula is ours.

    A tag that n images have gets n^-temperature. Of an image, the weight in a class is the mean over its tags of that
    class, divided by the mean of that over the images that have such tags; without a tag of the class it is 1. The
    image's weight is the product over the classes, limited to smallest and largest, and divided by the mean over all.

    classes: a csv file of lines `tag,class`, or a folder with one text file for each class, one tag a line, named after
    the class. Other tags are "general". Tags are what commas separate in an image's first caption; where no caption has
    a comma, they are words. Case does not count, and "_" is a blank.
    """

    temperature: Annotated[float, Field(ge=0)] = 0.5
    smallest: Positive = 0.2
    largest: Positive = 5.0
    classes: Path | None = None

    def __post_init__(self) -> None:
        if self.smallest > self.largest:
            raise UserError(
                f"sample_weights.smallest={self.smallest:g} is more than sample_weights.largest={self.largest:g}; "
                "set a smaller one"
            )

    def __call__(self, index: Index) -> Tensor:
        found = Tagged.of(index.items)
        names = read_classes(self.classes) if self.classes else {}
        kinds, of = np.unique([names.get(tag, GENERAL) for tag in found.tags], return_inverse=True)
        by_tag = found.images**-self.temperature
        whole = np.ones(len(index.items))
        for kind in range(len(kinds)):
            counted = (of == kind).astype(np.float64)
            sums, counts = found.sums(counted * by_tag), found.sums(counted)
            has = counts > 0
            mean = sums[has] / counts[has]
            whole[has] *= mean / mean.mean()
        whole = whole.clip(self.smallest, self.largest)
        return torch.from_numpy((whole / whole.mean()).astype(np.float32))


# --- tags of captions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tagged:
    """The tags of N images. tags: each once; images: [tags] how many images have it."""

    count: int  # N
    tags: Sequence[str]
    blocks: Sequence[tuple[NDArray[np.uint32], NDArray[np.uint32]]]  # image and tag, each pair once, by image

    @classmethod
    def of(cls, rows: Rows) -> Tagged:
        captions = pc.list_element(rows.column("captions"), 0)
        separator = "," if pc.any(pc.match_substring(captions, ",")).as_py() else " "
        known: dict[str, int] = {}
        blocks = [
            _pairs(captions.slice(start, BLOCK).combine_chunks(), separator, known, start)
            for start in range(0, len(captions), BLOCK)
        ]
        return cls(len(captions), list(known), blocks)

    @cached_property
    def images(self) -> NDArray[np.int64]:
        counts = np.zeros(len(self.tags), np.int64)
        for _, tags in self.blocks:
            counts += np.bincount(tags, minlength=len(counts))
        return counts

    def sums(self, values: Array) -> Array:
        """[N] the sum of `values` [tags] over the tags of each image."""
        whole = np.zeros(self.count)
        for images, tags in self.blocks:
            if len(images):
                first, last = int(images[0]), int(images[-1]) + 1
                whole[first:last] = np.bincount(images - first, values[tags], last - first)
        return whole


def _pairs(
    captions: pa.Array, separator: str, known: dict[str, int], first: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Image and tag, each pair once, of the captions of the images from `first` on. New tags become `known`."""
    lists = pc.split_pattern(captions, separator)
    written = pc.list_flatten(lists).dictionary_encode()
    tags = plain(written.dictionary).to_pylist()
    numbers = np.array([known.setdefault(tag, len(known)) if tag else -1 for tag in tags], np.int64)
    of = numbers[written.indices.to_numpy()]
    images = first + pc.list_parent_indices(lists).to_numpy()
    both = np.sort((images << 32 | of)[of >= 0])  # numpy's unique hashes, which takes a hundred times as long
    both = both[np.diff(both, prepend=-1) != 0]
    return (both >> 32).astype(np.uint32), both.astype(np.uint32)


def plain(tags: Any) -> Any:
    """Tags in lower case, with blanks for "_", without blanks around them."""
    return pc.utf8_trim_whitespace(pc.utf8_lower(pc.replace_substring(tags, "_", " ")))


def read_classes(path: Path) -> Mapping[str, str]:
    """Tag -> class. Raises UserError for what cannot be read."""
    try:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        rows = [row for file in files for row in _rows(file, path.is_dir())]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"sample_weights.classes={path}: {error}; give a csv file of lines 'tag,class', or a folder of text files "
            "that are named after the classes"
        ) from error
    if not rows:
        raise UserError(f"sample_weights.classes={path} names no tag; leave it out to have one class")
    tags = plain(pa.array([tag for tag, _ in rows], pa.string())).to_pylist()
    return dict(zip(tags, (kind for _, kind in rows), strict=True))


def _rows(file: Path, whole: bool) -> Iterable[tuple[str, str]]:
    """Tag and class. whole: the file is a class."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if whole:
            return [(line.strip(), file.stem) for line in lines if line.strip()]
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
    if bad := [row for row in rows if len(row) < 2 or not row[1]]:
        raise ValueError(f"{bad[0]} is no line of tag and class")
    return [(row[0], row[1]) for row in rows]


# --- the report -------------------------------------------------------------------------------------------------------


class TagRow(NamedTuple):
    tag: str
    images: int
    weight: float  # mean of the images that have it


def by_tag(index: Index, weights: Tensor) -> list[TagRow]:
    """The tags that more than one image has, the heaviest first, whatever made the weights."""
    found = Tagged.of(index.items)
    sums, values = np.zeros(len(found.tags)), weights.double().numpy()
    for images, tags in found.blocks:
        sums += np.bincount(tags, values[images], len(sums))
    columns = zip(found.tags, found.images.tolist(), (sums / found.images).tolist(), strict=True)
    rows = [TagRow(*row) for row in columns if row[1] > 1]
    return sorted(rows, key=lambda row: (-row.weight, row.tag))


def in_words(weights: Tensor, rows: list[TagRow], shown: int = 5) -> str:
    """The range of the weights, and the heaviest and lightest tags."""
    words = f"{weights.min():.3g} to {weights.max():.3g}"
    named = [f"{row.tag} {row.weight:.3g} (in {row.images})" for row in rows]
    if len(named) > 2 * shown:
        return f"{words}; heaviest tags: {', '.join(named[:shown])}; lightest: {', '.join(named[-shown:])}"
    return f"{words}; tags: {', '.join(named)}" if named else words


def write_tags(rows: Iterable[TagRow], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("tag", "images", "mean weight of its images"))
        writer.writerows((row.tag, row.images, f"{row.weight:.6g}") for row in rows)
