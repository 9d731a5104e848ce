"""One part of an index, such as a shard: its images as rows, and beside them what cannot be used, with the reason."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from nai_xl.data.images import UNREADABLE, Looked, look, why
from nai_xl.data.rows import SCHEMA

AT_ONCE = 1 << 14  # rows that are Python objects at a time
SHARD = pa.field("shard", pa.int32())  # the number of the part
NOTES = (
    pa.field("_fault", pa.string()),  # why the image cannot be used, if so; its content is null then
    pa.field("_kind", pa.string()),  # the same in a word or two
    pa.field("_longest", pa.int32()),  # bytes of the longest caption
    pa.field("_profile", pa.uint8()),  # colour.Profile
)


class Fault(NamedTuple):
    """Why something cannot be used. kind: the same in a word or two, for counts."""

    kind: str
    reason: str


def looked_at(data: bytes | Fault) -> Looked | Fault:
    """What the index keeps of an image's bytes."""
    if isinstance(data, Fault):
        return data
    try:
        return look(io.BytesIO(data))
    except UNREADABLE as error:
        return Fault("unreadable image", f"not a readable image: {why(error)}")


@dataclass
class Part:
    """The rows of part number `shard`. where: further columns, in which a row tells its Store where the bytes are."""

    shard: int
    where: Sequence[pa.Field]
    rows: list[dict[str, Any]] = field(default_factory=list)
    batches: list[pa.RecordBatch] = field(default_factory=list)

    def add(
        self, name: bytes, image: Looked | Fault, captions: Sequence[str] | Fault, where: Mapping[str, Any]
    ) -> None:
        """An image, or what is wrong with it or else with its captions."""
        if isinstance(image, Fault) or isinstance(captions, Fault):
            self.list(name, image if isinstance(image, Fault) else captions)  # type: ignore[arg-type]
            return
        longest = max(len(text.encode()) for text in captions)
        noted = {"_longest": longest, "_profile": image.profile}
        size = {"width": image.width, "height": image.height}
        self._row(name, {"content": image.content, **size, "captions": [*captions], **noted, **where})

    def list(self, name: bytes, fault: Fault) -> None:
        self._row(name, {"_fault": fault.reason, "_kind": fault.kind})

    def table(self) -> pa.Table:
        self._flush()
        return pa.Table.from_batches(self.batches, self._schema)

    @property
    def _schema(self) -> pa.Schema:
        return pa.schema([*SCHEMA, SHARD, *self.where, *NOTES])

    def _row(self, name: bytes, values: Mapping[str, Any]) -> None:
        self.rows.append({"path": as_path(name), SHARD.name: self.shard, **values})
        if len(self.rows) == AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self.batches.append(pa.RecordBatch.from_pylist(self.rows, self._schema))
        self.rows.clear()


def as_path(name: bytes) -> bytes:
    """A name that Path keeps as it is: it takes out dots and second slashes, and no system's name holds a NUL."""
    return os.fsencode(Path(os.fsdecode(name.replace(b"\0", b"\\0"))))
