"""data=table: parquet, jsonl or csv files with a column of images, or of where they lie, and a column of captions."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from nai_xl.data.images import Looked
from nai_xl.data.index import Index
from nai_xl.data.index_file import mapped
from nai_xl.data.source import columns, linked, places, sheet
from nai_xl.data.source.columns import Columns
from nai_xl.data.source.gathered import gathered
from nai_xl.data.source.limits import Limited
from nai_xl.data.source.part import Fault, Part, looked_at
from nai_xl.data.source.sheet import Row
from nai_xl.errors import one_line

# of a row with bytes, its row group and place there; of another, where its image lies
WHERE = (
    pa.field("group", pa.int32()),
    pa.field("place", pa.int32()),
    pa.field("at", pa.binary()),
    pa.field("_group_bytes", pa.int64()),
)
COSTLY = 64 << 20  # bytes of a row group
KEPT = 256 << 20  # bytes of row groups that a process keeps, beside the one that it has read last
TOGETHER = 64  # images that are fetched at a time


@dataclass(frozen=True)
class TableSource(Limited):
    """Rows with an image and a caption. `files`: as data=shards has them.

    `image` is a column of bytes, of {bytes, path} as Hugging Face's datasets writes it, or of names (seen from the
    table's folder) and addresses. `caption` is a column of texts or of lists of texts.
    """

    files: str | Sequence[str]
    image: str | None = None
    caption: str | None = None

    def scan(self) -> Index:
        files = places.find("data.files", self.files, sheet.SUFFIXES)
        which = self._columns(files[0])
        pairs = zip(files, places.stamps("data.files", files), strict=True)
        stamps = [stamp + _mark(where, which) for where, stamp in pairs]
        found = gathered("data.files", ["table", *which], files, stamps, partial(read_table, which=which))
        index = found.index(self, RowGroups(tuple(files), which.image))
        index.remarks = [*_costly(mapped(found.file)), *index.remarks]
        return self.settled(index)

    def _columns(self, where: str) -> Columns:
        with places.told("data.files", where):
            return columns.found(sheet.names(where), self.image, self.caption, places.name(where))


def _costly(table: pa.Table) -> Iterator[str]:
    """What reading images out of large row groups costs."""
    largest = pc.max(table["_group_bytes"]).as_py() or 0
    if largest > COSTLY:
        yield (
            f"to read one image a row group is read, here of up to {largest >> 20} MiB; tables that are written with "
            "row_group_size=100, or shards (data=shards), are read faster"
        )


def read_table(number: int, where: str, which: Columns) -> pa.Table:
    """The rows of a table. Raises UserError where it cannot be read."""
    part, home = Part(number, WHERE), os.fsencode(places.name(where))
    with places.told("data.files", where), ThreadPoolExecutor(places.AT_ONCE) as pool:
        rows = sheet.rows(where, which)
        while several := list(islice(rows, TOGETHER)):
            for row, (at, image) in zip(several, pool.map(partial(_image, where), several), strict=True):
                name = os.fsencode(places.name(at)) if at else home + b"/%d" % row.number
                lies = {
                    "group": row.group,
                    "place": row.place,
                    "at": at and os.fsencode(at),
                    "_group_bytes": row.group_bytes,
                }
                part.add(name, image, columns.as_captions(row.caption), lies)
    return part.table()


def _image(where: str, row: Row) -> tuple[str | None, Looked | Fault]:
    """Where the image of a row lies, if not in it, and what it is, or why there is none."""
    data, at = columns.as_image(row.image)
    if row.wrong:
        return None, Fault("unreadable row", row.wrong)
    if at is None:
        return None, looked_at(Fault("no image", "no image in this row") if data is None else data)
    at = linked.seen_from(where, at)
    return at, looked_at(linked.fetched(where, at))


def _mark(where: str, which: Columns) -> str:
    with places.told("data.files", where):
        named = (columns.as_image(row.image)[1] for row in sheet.rows(where, which, images=False))
        return linked.mark(where, filter(None, named))


# --- random access ----------------------------------------------------------------------------------------------------


@dataclass
class _Recent:
    """Columns of row groups that were read last, of all tables of a process."""

    groups: OrderedDict[tuple[str, int, str], pa.ChunkedArray] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def column(self, where: str, group: int, image: str) -> pa.ChunkedArray:
        key = where, group, image
        with self.lock:  # threads that want the same group wait for one to read it
            if key not in self.groups:
                with sheet.parquet(where) as file:
                    self.groups[key] = file.read_row_group(group, [image])[image]
            self.groups.move_to_end(key)
            while len(self.groups) > 1 and sum(column.nbytes for column in self.groups.values()) > KEPT:
                self.groups.popitem(last=False)
            return self.groups[key]


_recent = _Recent()


@dataclass(frozen=True)
class RowGroups:
    """A Store of images in the rows of parquet files. One image costs reading its row group, unless it is among the
    last ones that the process has read.
    """

    files: tuple[str, ...]
    image: str

    def open(self, row: dict[str, Any]) -> BinaryIO:
        if row["at"] is not None:
            return io.BytesIO(places.read(os.fsdecode(row["at"])))
        where = self.files[row["shard"]]
        try:
            value = _recent.column(where, row["group"], self.image)[row["place"]].as_py()
        except places.failures(IndexError) as error:
            raise OSError(f"{places.name(where)}: {one_line(error)}") from error
        data, _ = columns.as_image(value)
        if data is None:
            raise OSError(f"{places.name(where)}: no image in row {row['place']} of row group {row['group']} any more")
        return io.BytesIO(data)
