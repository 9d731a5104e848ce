"""Tables of images, row by row: parquet, jsonl and csv, on this machine or in object storage."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from nai_xl.data.source import columns, places
from nai_xl.data.source.caption_files import encoding_of
from nai_xl.data.source.columns import Columns

AT_ONCE = 16  # rows of a parquet file that are in memory together, while it is read through
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv")


class Row(NamedTuple):
    """One row of a table. group, place: of a parquet file, the row group and the place in it; group_bytes: how much of
    the group is read for one image.

    wrong: why the row cannot be read.
    """

    number: int
    image: Any = None
    caption: Any = None
    group: int = -1
    place: int = -1
    group_bytes: int = 0
    wrong: str = ""


def names(where: str) -> list[str]:
    """The columns of a table. Raises one of places.failures()."""
    return _KINDS[_suffix(where)].names(where)


def rows(where: str, which: Columns, *, images: bool = True) -> Iterator[Row]:
    """Every row. images: without them, only names and addresses are read, and no bytes. Raises as `names`."""
    return _KINDS[_suffix(where)].rows(where, which, images)


def _suffix(where: str) -> str:
    path = where.split("?")[0].lower() if places.is_remote(where) else where.lower()
    return next((suffix for suffix in SUFFIXES if path.endswith(suffix)), ".parquet")


class _Kind(NamedTuple):
    names: Callable[[str], list[str]]
    rows: Callable[[str, Columns, bool], Iterator[Row]]


# --- parquet ----------------------------------------------------------------------------------------------------------


@contextmanager
def parquet(where: str) -> Iterator[pq.ParquetFile]:
    """A parquet file. Raises OSError, pyarrow.ArrowInvalid."""
    if not places.is_remote(where):
        with pq.ParquetFile(where, memory_map=True) as file:
            yield file
        return
    with places.opened(where) as source, pq.ParquetFile(source, pre_buffer=True) as file:
        yield file


def _parquet_names(where: str) -> list[str]:
    with parquet(where) as file:
        return list(file.schema_arrow.names)


def _parquet_rows(where: str, which: Columns, images: bool) -> Iterator[Row]:
    with parquet(where) as file:
        columns.refuse_kinds(file.schema_arrow, which, places.name(where))
        wanted = [*which] if images else _without_bytes(file.schema_arrow, which.image)
        number = 0
        for group in range(file.num_row_groups if wanted else 0):
            place, large = 0, _bytes(file.metadata.row_group(group), which.image)
            for batch in file.iter_batches(AT_ONCE if images else 1 << 14, [group], wanted):
                for row in batch.to_pylist():
                    yield Row(number, row[which.image], row.get(which.caption), group, place, large)
                    number, place = number + 1, place + 1


def _bytes(group: Any, image: str) -> int:
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == image)


def _without_bytes(schema: pa.Schema, image: str) -> list[str]:
    kind = schema.field(image).type
    if pa.types.is_struct(kind):
        return [f"{image}.path"] if kind.get_field_index("path") >= 0 else []
    return [] if columns.is_bytes(kind) else [image]


# --- jsonl and csv ----------------------------------------------------------------------------------------------------


def _jsonl(where: str) -> Iterator[Row | Mapping[str, Any]]:
    with places.opened(where) as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else Row(number, wrong=f"line {number + 1} is no JSON object")


def _csv(where: str) -> Iterator[Row | Mapping[str, Any]]:
    with places.opened(where) as file:
        encoding = encoding_of(file.read(4), "utf-8")
        file.seek(0)
        text = io.TextIOWrapper(cast(Any, file), encoding=encoding, errors="surrogateescape", newline="")
        reader = csv.DictReader(text)
        while True:
            try:
                yield next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(reader.line_num, wrong=f"line {reader.line_num}: {error}")


def _names_in(records: Callable[[str], Iterator[Row | Mapping[str, Any]]]) -> Callable[[str], list[str]]:
    def names(where: str) -> list[str]:
        return next(([*map(str, row)] for row in records(where) if not isinstance(row, Row)), [])

    return names


def _rows_in(
    records: Callable[[str], Iterator[Row | Mapping[str, Any]]],
) -> Callable[[str, Columns, bool], Iterator[Row]]:
    def rows(where: str, which: Columns, images: bool) -> Iterator[Row]:
        for number, row in enumerate(records(where)):
            yield row if isinstance(row, Row) else Row(number, row.get(which.image), row.get(which.caption))

    return rows


_KINDS = {
    ".parquet": _Kind(_parquet_names, _parquet_rows),
    ".jsonl": _Kind(_names_in(_jsonl), _rows_in(_jsonl)),
    ".ndjson": _Kind(_names_in(_jsonl), _rows_in(_jsonl)),
    ".csv": _Kind(_names_in(_csv), _rows_in(_csv)),
}
