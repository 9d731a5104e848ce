"""The images of an index in the columns of an Arrow table: as many as there are, and no Python object for any of them.

A table that lies in a file is memory-mapped: opening it reads nothing, and processes share what was read of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from nai_xl.diffusion.ideal import Law
    from nai_xl.interfaces import Bucket

DIGEST = 32  # bytes of SHA-256
AT_ONCE = 1 << 16  # rows of a column that are put in order at a time: fewer than overflow an offset of Arrow's
BETWEEN = "\x1e"  # captions of one image
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

WITHIN = ("offset", "place", "group", "shard", "source")  # columns that say where bytes lie; the last one first


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
    root: Path = Path()

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
        return cls(table_of(SCHEMA, columns), given=given)

    @classmethod
    def mapped(cls, file: Path, store: Store | None = None, root: Path = Path()) -> Rows:
        """The usable images of an index file (nai_xl.data.index_file). Columns whose name begins with _ are left out:
        they are the source's notes for its next scan.

        Raises OSError, and pyarrow.ArrowInvalid for a file that is none.
        """
        with pa.memory_map(str(file)) as source:
            whole = pa.ipc.open_file(source).read_all()
        usable = (whole.schema.metadata or {}).get(b"usable")
        table = whole.select([name for name in whole.column_names if not name.startswith("_")])
        return cls(table if usable is None else table.slice(0, int(usable)), store, file=file, root=root)

    def __reduce__(self) -> tuple[Any, ...]:
        """A mapped file is mapped again in the process that this is sent to."""
        if self.file is None:
            return Rows, (self.table, self.store, self.given, self.picked, None, self.root)
        return _mapped_again, (self.file, self.store, self.root, self.picked)

    def __len__(self) -> int:
        return len(self.table) if self.picked is None else len(self.picked)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> Rows: ...
    def __getitem__(self, number: int | slice) -> Item | Rows:
        if isinstance(number, slice):
            return self.take(np.arange(*number.indices(len(self)), dtype=np.uint32))
        return self._item(self._place(number))

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, range(len(self)) if self.picked is None else map(int, self.picked))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and [*self] == [*other]

    def _place(self, number: int) -> int:
        """Which row of the table an item is. Raises IndexError."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        place = range(len(self))[number]
        return place if self.picked is None else int(self.picked[place])

    @cached_property
    def _columns(self) -> dict[str, pa.ChunkedArray]:
        return dict(zip(self.table.column_names, self.table.columns, strict=True))

    def value(self, name: str, number: int) -> Any:
        """One value of one item: a sample needs few of them, and an Item takes all."""
        return self._columns[name][self._place(number)].as_py()

    def size(self, number: int) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.value("width", number), self.value("height", number)

    def _item(self, place: int) -> Item:
        if self.given is not None:
            return self.given[place]
        row = {name: column[place].as_py() for name, column in self._columns.items()}
        first, *others = row["captions"]
        path, content, size = self.root / os.fsdecode(row["path"]), row["content"].hex(), (row["width"], row["height"])
        return Item(path, first, size, content, None, tuple(others), self.store, row)

    def take(self, numbers: NDArray[Any]) -> Rows:
        """The items with these numbers, in this order. No column is copied."""
        numbers = numbers.astype(np.uint32)
        picked = numbers if self.picked is None else self.picked[numbers]
        return replace(self, picked=picked)

    def are_at(self, paths: Iterable[Path]) -> NDArray[np.bool_]:
        """[N]: whether an item's path is one of these."""
        root = os.fsencode(self.root / "_")[:-1]  # with its slash; nothing where there is no root
        within = [name.removeprefix(root) for name in map(os.fsencode, paths) if name.startswith(root)]
        found: NDArray[np.bool_] = pc.is_in(self.column("path"), pa.array(within, pa.binary())).to_numpy()
        return found

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of these items, in their order."""
        whole = self.table[name]
        if self.picked is None:
            return whole
        parts = [
            chunk
            for start in range(0, len(self), AT_ONCE)
            for chunk in _taken(whole, self.picked[start : start + AT_ONCE]).chunks
        ]
        return pa.chunked_array(parts, whole.type)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """[N,2] width, height in pixels."""
        return np.stack([self.column(name).to_numpy() for name in ("width", "height")], axis=1)

    @property
    def lies(self) -> NDArray[np.int64]:
        """[N]: grows along the files in which the bytes lie, for who reads many images; zeros where each is a file."""
        names = [name for name in WITHIN if name in self.table.column_names]
        place = np.zeros(len(self), np.int64)
        if names:
            columns = [pc.fill_null(self.column(name), 0).to_numpy() for name in names]
            place[np.lexsort(columns)] = np.arange(len(self))
        return place

    @property
    def contents(self) -> NDArray[np.uint8]:
        """[N,32]: SHA-256 of each image's bytes."""
        return as_bytes(self.column("content"))

    def order(self) -> NDArray[np.int64]:
        """The items' numbers by content and then by captions, as every source has them."""
        return ordered(pa.table({name: self.column(name) for name in ("content", "captions")}))

    def captions(self) -> Iterator[tuple[str, ...]]:
        """Those of each item, of all of them one after the other."""
        for start in range(0, len(self), AT_ONCE):
            yield from map(tuple, self[start : start + AT_ONCE].column("captions").to_pylist())

    def joined(self) -> pa.ChunkedArray:
        """The captions of each item as one string."""
        return pc.binary_join(self.column("captions"), BETWEEN)


def _mapped_again(file: Path, store: Store | None, root: Path, picked: NDArray[np.uint32] | None) -> Rows:
    rows = Rows.mapped(file, store, root)
    return rows if picked is None else rows.take(picked)


def _taken(column: pa.ChunkedArray, places: NDArray[np.uint32]) -> pa.ChunkedArray:
    """`places` of a column. Arrow would first join all chunks, so it is given no more than lie between them."""
    first, last = int(places.min()), int(places.max())
    between = column.slice(first, last - first + 1)
    if len(between) == len(places) and (np.diff(places.astype(np.int64)) == 1).all():
        return between
    return between.take(pa.array(places - np.uint32(first)))


def table_of(schema: pa.Schema, columns: Sequence[Sequence[Any]]) -> pa.Table:
    """The table of these columns, each a list of values."""
    if not columns[0]:  # making columns of lists imports pandas
        return pa.Table.from_arrays([pa.nulls(0, one.type) for one in schema], schema=schema)
    return pa.table([pa.array(values, one.type) for values, one in zip(columns, schema, strict=True)], schema=schema)


def as_bytes(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """[N,width] of a column of fixed width, without a copy where it has one chunk."""
    width = column.type.byte_width
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, width)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    if not parts:
        return np.zeros((0, width), np.uint8)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def of_bytes(data: bytes, width: int) -> pa.Array:
    """The column of fixed width whose values are `data` in pieces."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(data) // width, [None, pa.py_buffer(data)])


def ordered(table: pa.Table) -> NDArray[np.int64]:
    """The numbers of the rows, by content and then by captions; those without a content come last."""
    absent = table["content"].is_null().to_numpy()
    first = np.ascontiguousarray(as_bytes(table["content"])[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    first[absent] = np.iinfo(np.uint64).max
    order = np.lexsort((first, absent)) if absent.any() else np.argsort(first, kind="stable")
    same = first[order[1:]] == first[order[:-1]]
    tied = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
    if len(tied):  # copies of a file: the few that need more than the first bytes of their content
        numbers = order[tied]
        rows = table.select(["content", "captions"]).take(pa.array(numbers)).to_pylist()
        keys = [(row["content"] is None, row["content"] or b"", BETWEEN.join(row["captions"] or ())) for row in rows]
        order[tied] = numbers[sorted(range(len(keys)), key=keys.__getitem__)]
    return order
