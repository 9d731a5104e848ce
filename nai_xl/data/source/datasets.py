"""data=datasets: a folder that Hugging Face's `datasets` has saved, read without that package.

Dataset.save_to_disk writes Arrow streams of record batches, which state.json lists; DatasetDict.save_to_disk writes a
folder of that kind for each split, which dataset_dict.json lists. Bytes lie in such a file as they are, so that an
image is a range of it. Apache Arrow columnar format, "IPC Streaming Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from nai_xl.data.index import Index
from nai_xl.data.source import columns, linked, places
from nai_xl.data.source.columns import Columns
from nai_xl.data.source.gathered import gathered
from nai_xl.data.source.limits import Limited
from nai_xl.data.source.part import Fault, Part, looked_at
from nai_xl.errors import UserError

WHERE = (pa.field("offset", pa.int64()), pa.field("length", pa.int64()), pa.field("at", pa.binary()))
STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class DatasetsSource(Limited):
    """A folder made by Dataset.save_to_disk, or by DatasetDict.save_to_disk and then `split` of it.

    `image` is a column of the feature Image, or of bytes; `caption` one of texts or of lists of texts.
    """

    dir: str
    split: str | None = None
    image: str | None = None
    caption: str | None = None

    def scan(self) -> Index:
        files = saved_files(self.dir, self.split)
        with places.told("data.dir", files[0]), stream(files[0]) as (schema, _):
            which = columns.found(schema.names, self.image, self.caption, places.name(files[0]))
        stamps = places.stamps("data.dir", files)
        found = gathered("data.dir", ["datasets", *which], files, stamps, partial(read_stream, which=which))
        return self.settled(found.index(self, places.Ranges(tuple(files))))


def saved_files(folder: str, split: str | None) -> list[str]:
    """The Arrow files of a saved dataset, in its order. Raises UserError for a folder that is none."""
    folder = folder.rstrip("/") if places.is_remote(folder) else str(Path(folder).expanduser())
    if Path(folder).is_file():
        raise UserError(f"data.dir={folder}: a file; set data.dir to the folder that save_to_disk has made")
    splits = _json(folder, SPLITS)
    if splits is not None:
        known = [str(name) for name in _items(splits, "splits")]
        if split not in known:
            which = f"data.split={split} is none of its splits" if split else "it has several splits"
            raise UserError(f"data.dir={places.shown(folder)}: {which}; set data.split to one of {', '.join(known)}")
        folder = f"{folder}/{_plain(folder, str(split))}"
    elif split is not None:
        raise UserError(f"data.split={split}: {places.shown(folder)} has no splits; leave data.split out")
    state = _json(folder, STATE)
    if state is None:
        raise UserError(
            f"data.dir={places.shown(folder)}: no {STATE} there; set data.dir to a folder that save_to_disk has made. "
            "Parquet files are for data=table"
        )
    if state.get("_indices_data_files"):
        raise UserError(
            f"data.dir={places.shown(folder)} was saved by an early version of datasets, with a list of the rows that "
            "count; load and save it again"
        )
    names = [str(file.get("filename")) for file in _items(state, "_data_files") if isinstance(file, dict)]
    files = [f"{folder}/{_plain(folder, name)}" for name in names]
    if not files:
        raise UserError(f"data.dir={places.shown(folder)}: {STATE} lists no files")
    return files


def _json(folder: str, name: str) -> dict[str, Any] | None:
    """None where there is no such file."""
    with places.told("data.dir", f"{folder}/{name}"):
        try:
            found = json.loads(places.read(f"{folder}/{name}"))
        except FileNotFoundError:
            return None
        except RecursionError:
            found = None
        if not isinstance(found, dict):
            raise ValueError("not what save_to_disk writes")
        return found


def _items(found: dict[str, Any], key: str) -> list[Any]:
    value = found.get(key)
    return value if isinstance(value, list) else []


def _plain(folder: str, name: str) -> str:
    """A name that stays in its folder."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise UserError(f"data.dir={places.shown(folder)}: lists {name!r}, which lies outside of it")
    return name


# --- the files --------------------------------------------------------------------------------------------------------


class Body(NamedTuple):
    """A record batch whose columns lie in `held`, which are the file's bytes from `offset` on."""

    batch: pa.RecordBatch
    held: pa.Buffer
    offset: int


@contextmanager
def stream(where: str) -> Iterator[tuple[pa.Schema, Iterator[Body]]]:
    """The schema of an Arrow stream, and its record batches. Both raise one of places.failures()."""
    with places.opened(where) if places.is_remote(where) else pa.memory_map(where) as source:
        messages = pa.ipc.MessageReader.open_stream(source)
        try:
            schema = pa.ipc.read_schema(messages.read_next_message())
        except StopIteration:
            raise ValueError("an empty file") from None
        yield schema, _bodies(schema, messages, source)


def _bodies(schema: pa.Schema, messages: pa.ipc.MessageReader, source: Any) -> Iterator[Body]:
    for message in messages:
        if message.type != "record batch":
            raise ValueError(f"it has a {message.type}; save it with plain columns")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)  # no length in it leads out of it
        yield Body(batch, message.body, source.tell() - message.body.size)


def read_stream(number: int, where: str, which: Columns) -> pa.Table:
    """The rows of an Arrow stream. Raises UserError where it cannot be read."""
    part, home = Part(number, WHERE), os.fsencode(places.name(where))
    with places.told("data.dir", where), stream(where) as (schema, bodies):
        columns.refuse_kinds(schema, which, places.name(where))
        count = 0
        for body in bodies:
            captions = body.batch[which.caption].to_pylist()
            for start, length, at, caption in zip(*_images(body, which.image), captions, strict=True):
                data: bytes | Fault = Fault("no image", "no image in this row")
                if length >= 0:
                    data, at = bytes(memoryview(body.held)[start : start + length]), None
                elif at:
                    at = linked.seen_from(where, at)
                    data = linked.fetched(where, at)
                name = os.fsencode(places.name(at)) if at else home + b"/%d" % count
                lies = {"offset": body.offset + start, "length": length, "at": at and os.fsencode(at)}
                part.add(name, looked_at(data), columns.as_captions(caption), lies)
                count += 1
    return part.table()


def _images(body: Body, image: str) -> tuple[list[int], list[int], list[str | None]]:
    """Of each row: where its bytes begin in `body.held`, how many they are, -1 for none, and the name of its file."""
    column = body.batch[image]
    none = [-1] * len(column)
    named: list[str | None] = [None] * len(column)
    if columns.is_text(column.type):
        return none, none, column.to_pylist()
    absent = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_struct(column.type):
        if column.type.get_field_index("path") >= 0:
            named = column.field("path").to_pylist()
        column = column.field("bytes")
        absent = absent | column.is_null().to_numpy(zero_copy_only=False)
    if absent.all():
        return none, none, named
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise ValueError(f"data.image={image}: {column.type}; save it with bytes of a plain kind")
    _, ends, values = column.buffers()
    kind = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    bounds = np.frombuffer(ends, kind)[column.offset : column.offset + len(column) + 1].astype(np.int64)
    bounds += values.address - body.held.address
    if bounds[0] < 0 or bounds[-1] > body.held.size:
        raise ValueError("its record batches are compressed; save it without, as datasets does")
    return bounds[:-1].tolist(), np.where(absent, -1, np.diff(bounds)).tolist(), named
