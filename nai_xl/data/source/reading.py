"""The rows of an index out of the files of a folder: what is new is read, what is not is taken over."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from nai_xl.data.colour import Profile
from nai_xl.data.images import READER, UNREADABLE, look, why
from nai_xl.data.rows import SCHEMA, as_bytes, of_bytes
from nai_xl.data.skipped import shown
from nai_xl.data.source.caption_files import NoCaption, Tables, decoded, lines_of, of_json
from nai_xl.data.source.listing import SUFFIX_OF, Kind, Listing
from nai_xl.data.source.part import NOTES
from nai_xl.errors import one_line

PART = 64  # files that a thread reads at a time
STAMP = 24  # bytes: three numbers of 64 bits
OF_FILES = (
    pa.field("_stamp", pa.binary(2 * STAMP)),  # zeros: to be looked at again at the next start
    pa.field("_source", pa.uint8()),  # listing.Kind
)
FACTS = pa.schema([*SCHEMA, *NOTES, *OF_FILES])
"""An index file of a folder."""


class Row(NamedTuple):
    """FACTS but the columns that the listing has."""

    content: bytes | None = None
    width: int | None = None
    height: int | None = None
    captions: list[str] | None = None
    profile: int = Profile.NONE
    fault: str | None = None
    kind: str | None = None
    passing: bool = False  # the fault may be gone at the next start although the file is the same


@dataclass(frozen=True)
class Known:
    """What an earlier index has of a listing's images: the numbers of its rows, -1 where it has none.

    whole: nothing has changed; picture, caption: at least that has not.
    """

    table: pa.Table
    whole: NDArray[np.int64]
    picture: NDArray[np.int64]
    caption: NDArray[np.int64]

    @classmethod
    def nothing(cls, length: int) -> Known:
        none = np.full(length, -1)
        return cls(FACTS.empty_table(), none, none, none)

    def take(self, numbers: NDArray[Any]) -> Known:
        return Known(self.table, self.whole[numbers], self.picture[numbers], self.caption[numbers])


def known(table: pa.Table, listing: Listing) -> Known:
    """What an earlier index, of whatever version of the folder, still says rightly."""
    found = pc.index_in(listing.names, value_set=table["path"].combine_chunks()).fill_null(-1).to_numpy()
    at = np.where(found < 0, 0, found)
    if not len(table):
        return Known.nothing(len(listing))
    stamps = as_bytes(table["_stamp"]).view(np.int64)[at]
    picture = (found >= 0) & (stamps[:, :3] == listing.stamps[:, :3]).all(axis=1)
    caption = (found >= 0) & (stamps[:, 3:] == listing.stamps[:, 3:]).all(axis=1)
    caption &= table["_source"].to_numpy()[at] == listing.kinds
    usable = ~table["content"].is_null().to_numpy()[at]
    same_reader = (table.schema.metadata or {}).get(b"reader") == READER.encode()
    whole = picture & caption & (usable | same_reader)
    numbers = found.astype(np.int64)
    return Known(table, *(np.where(mask, numbers, -1) for mask in (whole, picture & usable, caption & usable)))


@dataclass(frozen=True)
class Reader:
    """Of the files below `root`. lines: each line of a caption file is one caption. encoding: of captions."""

    root: bytes
    encoding: str
    lines: bool
    tables: Tables

    def read(self, listing: Listing, before: Known) -> pa.Table:
        """A table of FACTS, in the order of `listing`."""
        names = listing.names.to_pylist()
        pictures = _facts(before.table, before.picture, ["content", "width", "height", "_profile"])
        captions = _facts(before.table, before.caption, ["captions"])
        jobs = list(zip(names, listing.kinds.tolist(), listing.table.tolist(), pictures, captions, strict=True))
        with ThreadPoolExecutor() as pool:  # in parts: a task each would cost as much as looking at a small file
            parts = pool.map(
                lambda part: [self._row(*job) for job in part],
                (jobs[start : start + PART] for start in range(0, len(jobs), PART)),
            )
            rows = [row for part in parts for row in part]
        return _table(listing, rows)

    def _row(
        self, name: bytes, kind: int, table: int, picture: dict[str, Any] | None, caption: dict[str, Any] | None
    ) -> Row:
        path = os.path.join(self.root, name)  # noqa: PTH118 - names are bytes
        try:
            captions = caption["captions"] if caption else self._captions(path, name, Kind(kind), table)
        except NoCaption as error:
            return Row(fault=str(error), kind=error.kind)
        except OSError as error:
            shown = _file_name(_sidecar(path, Kind(kind)))
            reason = f"caption file {shown} cannot be read: {one_line(error)}"
            return Row(fault=reason, kind="unreadable caption", passing=True)
        if picture:
            return Row(picture["content"], picture["width"], picture["height"], captions, picture["_profile"])
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - a Path cannot be made of bytes
                width, height, content, profile = look(file)
        except UNREADABLE as error:
            passing = isinstance(error, OSError) and error.errno is not None
            return Row(fault=_unreadable(name, error), kind="unreadable image", passing=passing)
        return Row(content, width, height, captions, profile)

    def _captions(self, path: bytes, name: bytes, kind: Kind, table: int) -> list[str]:
        if kind == Kind.METADATA:
            return self.tables.captions(table, name)
        file = _sidecar(path, kind)
        with open(file, "rb") as opened:  # noqa: PTH123
            text = decoded(opened.read(), _file_name(file), self.encoding)
        if kind == Kind.JSON:
            return of_json(text, _file_name(file))
        return lines_of(text) if self.lines else [text]


def _unreadable(name: bytes, error: Exception) -> str:
    if name.lower().endswith((b".heic", b".heif", b".hif")) and "HEIF" not in READER:
        return "reading it needs pip install 'nai_xl[heic]'"
    return f"not a readable image: {why(error)}"


def _sidecar(path: bytes, kind: Kind) -> bytes:
    return path[: path.rindex(b".")] + SUFFIX_OF.get(kind, b"")


def _file_name(path: bytes) -> str:
    return shown(os.fsdecode(os.path.basename(path)))  # noqa: PTH119 - names are bytes


def _facts(table: pa.Table, numbers: NDArray[np.int64], columns: Sequence[str]) -> list[dict[str, Any] | None]:
    """The rows of `table` with these numbers, None for -1."""
    if not (numbers >= 0).any():
        return [None] * len(numbers)
    rows = table.select(columns).take(pa.array(numbers[numbers >= 0])).to_pylist()
    found = iter(rows)
    return [next(found) if number >= 0 else None for number in numbers.tolist()]


def _table(listing: Listing, rows: Sequence[Row]) -> pa.Table:
    stamps = np.where(np.array([[row.passing] for row in rows], bool), 0, listing.stamps).astype(np.int64)
    longest = [max((len(text.encode()) for text in row.captions or ()), default=0) for row in rows]
    columns = [
        pa.array([row.content for row in rows], SCHEMA.field("content").type),
        pa.array([row.width for row in rows], pa.int32()),
        pa.array([row.height for row in rows], pa.int32()),
        pa.array([row.captions for row in rows], SCHEMA.field("captions").type),
        listing.names,
        pa.array([row.fault for row in rows], pa.string()),
        pa.array([row.kind for row in rows], pa.string()),
        pa.array(longest, pa.int32()),
        pa.array([row.profile for row in rows], pa.uint8()),
        of_bytes(stamps.tobytes(), 2 * STAMP),
        pa.array(listing.kinds, pa.uint8()),
    ]
    return pa.table(columns, schema=FACTS)
