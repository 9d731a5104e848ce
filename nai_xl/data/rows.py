"""The images of an index in the columns of an Arrow table: as many as there are, and no Python object for any of them.

A table that lies in a file is memory-mapped: opening it reads nothing, and processes share what was read of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from nai_xl.diffusion.ideal import Law
    from nai_xl.interfaces import Bucket

DIGEST = 32  # bytes of SHA-256
AT_ONCE = 1 << 14  # rows whose captions are read at a time
SCHEMA = pa.schema(
    [
        pa.field("content", pa.binary(DIGEST)),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("path", pa.binary()),  # as the system has it: names need not be UTF-8
    ]
)
"""What every table has. A source may add columns, which its Store reads."""


class Drawn(Protocol):
    """Latents that a source makes itself, for whatever canvas; hashable."""

    def latents(self, bucket: Bucket) -> Tensor:
        """[4,h,w] float32, raw: before normalisation."""
        ...

    def law(self, bucket: Bucket) -> Law:
        """The distribution that `latents` come from, given the caption."""
        ...


class Store(Protocol):
    """Where the bytes of images lie that are no files of their own. Sent to the loader's workers: picklable."""

    def open(self, row: dict[str, Any]) -> BinaryIO:
        """The bytes of the image of one row: a column's name -> its value. Raises OSError."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """One image: `size` is (width, height) as seen, after EXIF rotation; `content` hashes the file's bytes.

    `others` are its further captions. `drawn`: latents without a picture. `path` is then a name and no file, and
    `content` hashes all that they are made from. With a `store`, too, `path` is a name: its bytes lie where `row` says.
    """

    path: Path
    caption: str
    size: tuple[int, int]
    content: str
    drawn: Drawn | None = None
    others: tuple[str, ...] = ()
    store: Store | None = field(default=None, compare=False, repr=False)
    row: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.others)

    def open(self) -> BinaryIO:
        """Its bytes. Raises OSError."""
        if self.store is None:
            return self.path.open("rb")
        return self.store.open(self.row or {})


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Item]):
    """Items, made when they are asked for. `table`: SCHEMA's columns and a source's own.

    picked: which of the table's rows these are, in order; None for all. given: the items themselves, where a source
    made them one by one. file: where the table is mapped from.
    """

    table: pa.Table
    store: Store | None = None
    given: Sequence[Item] | None = None
    picked: NDArray[np.uint32] | None = None
    file: Path | None = None

    @classmethod
    def of(cls, items: Iterable[Item]) -> Rows:
        """Those of `items`, which are kept as they are."""
        if isinstance(items, Rows):
            return items
        given = list(items)
        columns: list[Any] = [
            [bytes.fromhex(item.content) for item in given],
            [item.size[0] for item in given],
            [item.size[1] for item in given],
            [list(item.captions) for item in given],
            [os.fsencode(item.path) for item in given],
        ]
        arrays = [pa.array(values, kind.type) for values, kind in zip(columns, SCHEMA, strict=True)]
        return cls(pa.table(arrays, schema=SCHEMA), given=given)

    @classmethod
    def mapped(cls, file: Path, store: Store | None = None) -> Rows:
        """The table in an Arrow file. Raises OSError, and pyarrow.ArrowInvalid for a file that is none."""
        with pa.memory_map(str(file)) as source:
            return cls(pa.ipc.open_file(source).read_all(), store, file=file)

    def __reduce__(self) -> tuple[Any, ...]:
        """A mapped file is mapped again in the process that this is sent to."""
        if self.file is None:
            return Rows, (self.table, self.store, self.given, self.picked)
        return _mapped_again, (self.file, self.store, self.picked)

    def __len__(self) -> int:
        return len(self.table) if self.picked is None else len(self.picked)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> Rows: ...
    def __getitem__(self, number: int | slice) -> Item | Rows:
        if isinstance(number, slice):
            return self.take(np.arange(len(self), dtype=np.uint32)[number])
        if not -len(self) <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        place = range(len(self))[number]
        return self._item(place if self.picked is None else int(self.picked[place]))

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, range(len(self)) if self.picked is None else map(int, self.picked))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and [*self] == [*other]

    def _item(self, place: int) -> Item:
        if self.given is not None:
            return self.given[place]
        row = {name: column[place].as_py() for name, column in zip(self.table.column_names, self.table, strict=True)}
        first, *others = row["captions"]
        path, content = Path(os.fsdecode(row["path"])), row["content"].hex()
        return Item(path, first, (row["width"], row["height"]), content, None, tuple(others), self.store, row)

    def take(self, numbers: NDArray[Any]) -> Rows:
        """The items with these numbers, in this order. No column is copied."""
        numbers = numbers.astype(np.uint32)
        picked = numbers if self.picked is None else self.picked[numbers]
        return Rows(self.table, self.store, self.given, picked, self.file)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of these items, in their order."""
        whole = self.table[name]
        return whole if self.picked is None else whole.take(pa.array(self.picked))

    @property
    def captions(self) -> Iterator[list[str]]:
        """Those of each image, read some thousands at a time."""
        for start in range(0, len(self), AT_ONCE):
            some = self.take(np.arange(start, min(start + AT_ONCE, len(self))))
            yield from some.column("captions").to_pylist()

    @property
    def sizes(self) -> NDArray[np.int32]:
        """[N,2] width, height in pixels."""
        return np.stack([_picked(self.table[name].to_numpy(), self.picked) for name in ("width", "height")], axis=1)

    @property
    def contents(self) -> NDArray[np.uint8]:
        """[N,32]: SHA-256 of each image's bytes."""
        return _picked(_digests(self.table["content"]), self.picked)


def _mapped_again(file: Path, store: Store | None, picked: NDArray[np.uint32] | None) -> Rows:
    rows = Rows.mapped(file, store)
    return rows if picked is None else rows.take(picked)


def _picked(values: NDArray[Any], picked: NDArray[np.uint32] | None) -> NDArray[Any]:
    return values if picked is None else values[picked]


def _digests(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """[N,32] of a column of fixed size, without a copy where it has one chunk."""
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, DIGEST)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    if not parts:
        return np.zeros((0, DIGEST), np.uint8)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
