"""The index: which images there are, their captions, sizes and content hashes; what cannot be used, and why.

A source (nai_xl.data.source) makes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from nai_xl.data.rows import AT_ONCE, DIGEST, Item, Rows
from nai_xl.data.skipped import Skipped, SkippedFiles, shown
from nai_xl.errors import UserError
from nai_xl.files import write_atomically

HEX = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), np.uint16)

OnChange = Literal["continue", "new", "refuse"]
"""What the same command does when the data are others than those that its run began with: it goes on with what is there
now, begins a run with another name, or stops and says what has changed.
"""


@dataclass(slots=True)
class Index:
    """The usable images, ordered by their content, and the skipped ones. What is held out is not among the items.

    Any iterable of items will do; kept are Rows.
    """

    items: Rows
    skipped: SkippedFiles
    held_out: Rows
    remarks: Sequence[str]  # what is to be said of it once
    on_change: OnChange  # of a run that was begun with other data

    def __init__(
        self,
        items: Iterable[Item],
        skipped: Iterable[Skipped] = (),
        held_out: Iterable[Item] = (),
        remarks: Sequence[str] = (),
        on_change: OnChange = "refuse",
    ):
        self.items, self.held_out = Rows.of(items), Rows.of(held_out)
        self.skipped, self.remarks, self.on_change = SkippedFiles.of(skipped), remarks, on_change

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
        return replace(self, items=kept, held_out=aside)

    def fingerprint(self) -> str:
        """16 hex characters over every image's content and captions, whatever the folder or file is called."""
        return noted_beside(self.items, _fingerprint)

    def without(self, unusable: dict[Path, str]) -> Index:
        """The index less the images that turned out unusable, with their reasons."""
        if not unusable:
            return self
        kept, held = (rows.take(np.flatnonzero(~rows.are_at(unusable))) for rows in (self.items, self.held_out))
        skipped = self.skipped.and_(Skipped(path, reason) for path, reason in unusable.items())
        return replace(self, items=kept, skipped=skipped, held_out=held)


def noted_beside(rows: Rows, find: Callable[[Rows], str]) -> str:
    """What `find` returns for these rows, kept beside the index file that they are mapped from."""
    if rows.file is None:
        return find(rows)
    picked = b"" if rows.picked is None else rows.picked.tobytes()
    note = rows.file.with_suffix(f".{find.__name__.strip('_')}-{hashlib.sha256(picked).hexdigest()[:16]}")
    with suppress(OSError):
        return note.read_text()
    found = find(rows)
    with suppress(OSError):
        write_atomically(note, lambda path: path.write_text(found))
    return found


def _fingerprint(rows: Rows) -> str:
    ordered, whole = rows.take(rows.order()), hashlib.sha256()
    for start in range(0, len(ordered), AT_ONCE):
        whole.update(b"\n" if start else b"")
        whole.update(_lines(ordered[start : start + AT_ONCE]))
    return whole.hexdigest()[:16]


def _lines(rows: Rows) -> memoryview:
    """For each image a line of its content, hexadecimal, and its captions."""
    ends = np.arange(len(rows) + 1, dtype=np.int32) * 2 * DIGEST
    contents = pa.StringArray.from_buffers(len(rows), pa.py_buffer(ends), pa.py_buffer(HEX[rows.contents]))
    words = pc.binary_join_element_wise(contents, rows.joined().combine_chunks(), " ")
    lines = pc.binary_join_element_wise(words, "", "\n")
    _, ends, text = lines.buffers()
    return memoryview(text)[: int(np.frombuffer(ends, np.int32)[len(rows)]) - 1]


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
        images = index.skipped.of_images()
        if not images:
            raise UserError(f"{where}: there is no image")
        reasons: Sequence[str] = [f"{shown(skip.path.name)}: {skip.reason}" for skip in images[:3]]
        raise UserError(f"{where}: none of {len(images)} images can be used. {'; '.join(reasons)}")
