"""The index: which images there are, their captions, sizes and content hashes; what cannot be used, and why.

A source (nai_xl.data.source) makes it.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from nai_xl.data.rows import Item, Rows
from nai_xl.errors import UserError

AT_ONCE = 1 << 16  # rows that a fingerprint reads at a time
BETWEEN = "\x1e"  # captions of one image


@dataclass(frozen=True, slots=True)
class Skipped:
    path: Path
    reason: str


@dataclass(slots=True)
class Index:
    """The usable images, ordered by their content, and the skipped ones. What is held out is not among the items.

    Any iterable of items will do; kept are Rows.
    """

    items: Rows
    skipped: list[Skipped]
    held_out: Rows

    def __init__(self, items: Iterable[Item], skipped: Sequence[Skipped] = (), held_out: Iterable[Item] = ()):
        self.items, self.skipped, self.held_out = Rows.of(items), list(skipped), Rows.of(held_out)

    def hold_out(self, share: float) -> Index:
        """The index with about `share` of its images held out: those whose content's hash lies below it.

        So an image is held out whatever the others are and wherever it lies, and its copies with it. Raises UserError
        when nothing is left to train on.
        """
        held = are_held_out(self.items.contents, share)
        if held.all():
            raise UserError(f"data.held_out={share} holds out all {len(held)} images; set a smaller share")
        if not held.any():
            return self
        kept, aside = (self.items.take(np.flatnonzero(mask)) for mask in (~held, held))
        return Index(kept, self.skipped, aside)

    def fingerprint(self) -> str:
        """16 hex characters over every image's content and captions, whatever the folder or file is called."""
        whole = hashlib.sha256()
        for number, row in enumerate(_in_order(self.items)):
            whole.update((b"\n" if number else b"") + row)
        return whole.hexdigest()[:16]

    def without(self, unusable: dict[Path, str]) -> Index:
        """The index less the images that turned out unusable, with their reasons."""
        if not unusable:
            return self
        named = pa.array([os.fsencode(path) for path in unusable], pa.binary())
        kept, held = (
            rows.take(np.flatnonzero(~pc.is_in(rows.column("path"), named).to_numpy()))
            for rows in (self.items, self.held_out)
        )
        return Index(kept, [*self.skipped, *(Skipped(path, reason) for path, reason in unusable.items())], held)

    def write_skipped(self, path: Path) -> None:
        """`skipped.csv`: file, reason."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("file", "reason"))
            writer.writerows((str(skip.path), skip.reason) for skip in self.skipped)


def _in_order(rows: Rows) -> Iterator[bytes]:
    """Content and captions of each image, sorted."""
    found = [row for start in range(0, len(rows), AT_ONCE) for row in _words(rows[start : start + AT_ONCE])]
    return iter(sorted(found))


def _words(rows: Rows) -> Iterator[bytes]:
    captions = rows.column("captions").to_pylist()
    for content, several in zip(rows.column("content").to_pylist(), captions, strict=True):
        yield f"{content.hex()} {BETWEEN.join(several)}".encode()


def are_held_out(contents: NDArray[np.uint8], share: float) -> NDArray[np.bool_]:
    """[N] of contents [N,32]: whether the first 52 bits, as a number from 0 to 1, lie below `share`."""
    first = np.ascontiguousarray(contents[:, :8]).view(">u8")[:, 0] >> 12
    return first.astype(np.float64) < share * 16**13


def is_held_out(item: Item, share: float) -> bool:
    return int(item.content[:13], 16) < share * 16**13


def refuse_without_pictures(items: Sequence[Item], reader: str, instead: str) -> None:
    """Raise UserError where an item has latents only. reader: what needs pictures; instead: the override that helps."""
    if any(item.drawn is not None for item in items[:1]):  # no source has both
        raise UserError(f"{reader} needs pictures, and these data are latents without any; set {instead}")


def refuse_empty(index: Index, where: str) -> None:
    """Raise UserError if every image was skipped, with the first reasons."""
    if not index.items:
        reasons: Sequence[str] = [f"{skip.path.name}: {skip.reason}" for skip in index.skipped[:3]]
        raise UserError(f"{where}: none of {len(index.skipped)} images can be used. {'; '.join(reasons)}")
