"""Where every key lies: an Arrow file over the shards of a folder, sorted by key and mapped into memory, and what has
been written since.

Nothing about an entry stays in a process's own memory, unless it is newer than the Arrow file. The file is only a
shortcut: without it, or with a damaged one, the same is read from the shards' keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nai_xl.data.shards.layout import Layout
from nai_xl.data.shards.shard import DEAD, KEYS, OPEN, SEALED, read_line, read_records, records_in, whole_rows
from nai_xl.files import write_atomically

MERGED = "index.arrow"
COLUMNS: dict[str, Any] = {"hi": np.uint64, "lo": np.uint64, "shard": np.uint32, "row": np.uint32, "crc": np.uint32}
ABOUT = b"shards"  # in the file's metadata: the shards by their numbers, and how many rows of each it covers

Numbers = NDArray[np.uint64]


def halves(keys: NDArray[np.uint8]) -> tuple[Numbers, Numbers]:
    """Both halves of keys [M,16] as numbers [M]."""
    both = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return both[:, 0], both[:, 1]


@dataclass(frozen=True, slots=True)
class Shard:
    """What a look into the folder says of one shard. whole: rows that its file has in full."""

    stem: str
    line: bytes
    layout: Layout
    rows: int
    whole: int


@dataclass(frozen=True, slots=True)
class Found:
    """Where one entry lies: row number `row` of a shard, and its checksum."""

    shard: Shard
    row: int
    crc: int


@dataclass(frozen=True)
class Table:
    """Columns [n], sorted by `hi`; `shard` counts in a catalogue's shards."""

    hi: NDArray[np.uint64]
    lo: NDArray[np.uint64]
    shard: NDArray[np.uint32]
    row: NDArray[np.uint32]
    crc: NDArray[np.uint32]

    @classmethod
    def of(cls, columns: Mapping[str, NDArray[Any]]) -> Table:
        order = np.argsort(columns["hi"], kind="stable")
        return cls(**{name: np.ascontiguousarray(columns[name][order], kind) for name, kind in COLUMNS.items()})

    @classmethod
    def empty(cls) -> Table:
        return cls(**{name: np.empty(0, kind) for name, kind in COLUMNS.items()})

    def __len__(self) -> int:
        return len(self.hi)

    def places(self, hi: np.uint64, lo: np.uint64) -> Iterator[int]:
        """Where the key stands; more than one place if it was written more than once."""
        place = int(self.hi.searchsorted(hi))
        while place < len(self) and self.hi[place] == hi:
            if self.lo[place] == lo:
                yield place
            place += 1


@dataclass
class Catalogue:
    """A look into a folder of shards. `dead`: shard << 32 | row of entries that are not to be read again."""

    folder: Path
    shards: Sequence[Shard] = ()
    merged: Table = field(default_factory=Table.empty)
    tail: Table = field(default_factory=Table.empty)
    dead: set[int] = field(default_factory=set)
    numbers: Mapping[int, int] = field(default_factory=dict)  # of the merged table's shards -> of `shards`
    seen: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, before: Catalogue | None = None) -> Catalogue:
        """Raises OSError. `before` is returned where nothing has changed."""
        seen = _sizes(folder)
        if before is not None and before.seen == seen:
            return before
        merged, covered = _read_merged(folder / MERGED)
        lines = {stem: line for stem, (line, _) in covered.items()}
        shards, stale = [], set()
        for stem in sorted(name.removesuffix(KEYS) for name in seen if name.endswith(KEYS)):
            shard = _shard(folder, stem, lines.get(stem), seen)
            if shard is not None:
                shards.append(shard)
                if stem in covered and covered[stem][1] > shard.rows:
                    stale.add(stem)  # another file of the same name: from a backup, perhaps
        place = {shard.stem: number for number, shard in enumerate(shards)}
        numbers = {n: place[stem] for n, stem in enumerate(covered) if stem in place and stem not in stale}
        tails = [
            (number, 0 if shard.stem in stale else covered.get(shard.stem, (b"", 0))[1])
            for number, shard in enumerate(shards)
        ]
        made = cls(folder, shards, merged, numbers=numbers, seen=seen)
        made.tail = Table.of(_joined([made._records(number, start) for number, start in tails]))
        made.dead = {
            place[stem] << 32 | int(row)
            for name in seen
            if name.endswith(DEAD) and (stem := name.removesuffix(DEAD)) in place
            for row in np.fromfile(folder / name, "<u4")
        }
        return made

    def _records(self, number: int, start: int) -> dict[str, NDArray[Any]]:
        """The columns of a shard's rows from `start` on."""
        shard = self.shards[number]
        if start >= shard.rows:
            return {}
        found = read_records(self.folder / f"{shard.stem}{KEYS}", shard.line, start, shard.rows)
        rows = np.arange(start, start + len(found), dtype=np.uint32)
        return {**{name: found[name] for name in ("hi", "lo", "crc")}, "row": rows, "shard": np.full(len(rows), number)}

    def find(self, key: bytes) -> Found | None:
        """Where the entry lies; None if there is none that could be whole."""
        hi, lo = (np.uint64(int.from_bytes(half, "big")) for half in (key[:8], key[8:]))
        for table, numbers in ((self.tail, None), (self.merged, self.numbers)):
            for place in table.places(hi, lo):
                number = int(table.shard[place])
                number = number if numbers is None else numbers.get(number, -1)
                row = int(table.row[place])
                if number >= 0 and row < self.shards[number].whole and number << 32 | row not in self.dead:
                    return Found(self.shards[number], row, int(table.crc[place]))
        return None

    def missing(self, keys: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], int]:
        """[M] whether there is no whole entry of keys [M,16]; of how many there is a damaged one. No file is read."""
        hi, lo = halves(keys)
        order = np.argsort(hi)  # neighbours are found in neighbouring places
        there, damaged = np.zeros(len(keys), bool), np.zeros(len(keys), bool)
        for table, numbers in ((self.tail, None), (self.merged, self.numbers)):
            if not len(table):
                continue
            places = np.minimum(table.hi.searchsorted(hi[order]), len(table) - 1)
            met = table.hi[places] == hi[order]
            exact = met & (table.lo[places] == lo[order])
            alive = exact & self._alive(table, numbers, places)
            there[order[alive]] = True
            for at in order[met & ~alive]:  # another key with this half, or a second try: one by one
                key = keys[at].tobytes()
                there[at] |= self.find(key) is not None
                damaged[at] |= any(True for _ in table.places(hi[at], lo[at]))
        return ~there, int((damaged & ~there).sum())

    def _alive(self, table: Table, numbers: Mapping[int, int] | None, places: NDArray[Any]) -> NDArray[np.bool_]:
        shard = table.shard[places].astype(np.int64)
        if numbers is not None:
            renumbered = np.full(max(numbers, default=0) + 1, -1)
            renumbered[list(numbers)] = list(numbers.values())
            inside = shard < len(renumbered)
            shard = np.where(inside, renumbered[np.minimum(shard, len(renumbered) - 1)], -1)
        whole = np.array([*(shard.whole for shard in self.shards), 0])  # and none of shard -1
        alive: NDArray[np.bool_] = table.row[places] < whole[shard]
        if self.dead:
            alive &= ~np.isin(shard << 32 | table.row[places], np.fromiter(self.dead, np.int64, len(self.dead)))
        return alive

    def merge(self) -> None:
        """Write the Arrow file anew, if it lacks something. Raises OSError."""
        if not len(self.tail):
            return
        columns = []
        for table, numbers in ((self.tail, None), (self.merged, self.numbers)):
            keep = self._alive(table, numbers, np.arange(len(table))) if len(table) else np.zeros(0, bool)
            kept = {name: getattr(table, name)[keep] for name in COLUMNS}
            if numbers is not None and numbers:
                kept["shard"] = np.array([numbers.get(n, 0) for n in range(max(numbers) + 1)])[kept["shard"]]
            columns.append(kept)
        whole = Table.of(_joined(columns))
        lines = list(dict.fromkeys(shard.line for shard in self.shards))
        about = {
            "lines": [line.decode() for line in lines],
            "shards": [(shard.stem, lines.index(shard.line), shard.whole) for shard in self.shards],
        }
        schema = pa.schema(
            [(name, pa.from_numpy_dtype(kind)) for name, kind in COLUMNS.items()], {ABOUT: json.dumps(about)}
        )
        batch = pa.record_batch([getattr(whole, name) for name in COLUMNS], schema=schema)

        def write(path: Path) -> None:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(batch)

        write_atomically(self.folder / MERGED, write, durable=False)


def _sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of all that belongs to shards; the Arrow file by its time, since it is put in place whole."""
    found = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith((KEYS, DEAD, SEALED, OPEN)):
                    found[entry.name] = entry.stat().st_size
                elif entry.name == MERGED:
                    found[entry.name] = entry.stat().st_mtime_ns
    except FileNotFoundError:
        pass
    return found


def _shard(folder: Path, stem: str, line: bytes | None, seen: Mapping[str, int]) -> Shard | None:
    """None where the first line of its keys is damaged."""
    if line is None:
        try:
            line = read_line(folder / f"{stem}{KEYS}")
        except FileNotFoundError:
            return None
    if (layout := Layout.read(line)) is None:
        return None
    rows = records_in(seen[f"{stem}{KEYS}"], line)
    size = max(seen.get(f"{stem}{SEALED}", 0), seen.get(f"{stem}{OPEN}", 0))
    return Shard(stem, line, layout, rows, whole_rows(size, layout, rows))


def _read_merged(path: Path) -> tuple[Table, dict[str, tuple[bytes, int]]]:
    """The table, and for each of its shards the layout's line and how many rows it covers. Nothing, if damaged."""
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        table.validate()  # that no column leads out of the file
        about = json.loads(table.schema.metadata[ABOUT])
        columns = {name: _mapped(table.column(name)).view(kind) for name, kind in COLUMNS.items()}
        lines = [line.encode() for line in about["lines"]]
        return Table(**columns), {str(stem): (lines[line], int(rows)) for stem, line, rows in about["shards"]}
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return Table.empty(), {}


def _mapped(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of one piece, as the file has it: joining pieces would copy it into memory."""
    return column.chunk(0).to_numpy() if column.num_chunks == 1 else column.combine_chunks().to_numpy()


def _joined(parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {
        name: np.concatenate([np.empty(0, kind), *(part[name].astype(kind) for part in parts if part)])
        for name, kind in COLUMNS.items()
    }
