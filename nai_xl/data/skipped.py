"""What was not used, and why: a table of as many rows as there are, and no Python object for any of them."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc

from nai_xl.data.rows import table_of

SCHEMA = pa.schema([pa.field("path", pa.binary()), pa.field("kind", pa.string()), pa.field("reason", pa.string())])
AT_ONCE = 1 << 16  # rows that are written, or turned into a table, at a time
OTHER = ("other", "hidden", "caption", "link", "no file")
"""Kinds of rows that are no images."""


@dataclass(frozen=True, slots=True)
class Skipped:
    path: Path
    reason: str
    kind: str = "unusable"


@dataclass(frozen=True, eq=False)
class SkippedFiles(Sequence[Skipped]):
    """Rows of SCHEMA, made when they are asked for. root: the folder that paths begin at."""

    table: pa.Table
    root: Path = Path()

    @classmethod
    def of(cls, rows: Iterable[Skipped]) -> SkippedFiles:
        if isinstance(rows, SkippedFiles):
            return rows
        given = list(rows)
        columns: list[Any] = [
            [os.fsencode(row.path) for row in given],
            [row.kind for row in given],
            [row.reason for row in given],
        ]
        return cls(table_of(SCHEMA, columns))

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, number: int) -> Skipped: ...
    @overload
    def __getitem__(self, number: slice) -> SkippedFiles: ...
    def __getitem__(self, number: int | slice) -> Skipped | SkippedFiles:
        if isinstance(number, slice):
            numbers = range(len(self))[number]
            return SkippedFiles(self.table.take(pa.array(numbers, pa.int64())), self.root)
        path, kind, reason = (self.table[name][number].as_py() for name in SCHEMA.names)
        return Skipped(self.root / os.fsdecode(path), reason, kind)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    def and_(self, more: Iterable[Skipped]) -> SkippedFiles:
        """These and others."""
        others = SkippedFiles.of(replace(row, path=self._within(row.path)) for row in more)
        return SkippedFiles(pa.concat_tables([self.table, others.table]), self.root)

    def _within(self, path: Path) -> Path:
        return path.relative_to(self.root) if path.is_relative_to(self.root) else path

    def counts(self) -> Mapping[str, int]:
        """Kind -> how many, the most frequent first."""
        found = Counter({row["values"]: row["counts"] for row in pc.value_counts(self.table["kind"]).to_pylist()})
        return dict(found.most_common())

    def of_images(self) -> SkippedFiles:
        """Those of them that are images, as far as their names tell."""
        others = pc.is_in(self.table["kind"], pa.array(OTHER))
        return SkippedFiles(self.table.filter(pc.invert(others)), self.root)

    def in_words(self) -> str:
        """How many images were skipped for which reason; empty for none."""
        images = self.of_images()
        counts = ", ".join(f"{number} {kind}" for kind, number in images.counts().items())
        return f" ({len(images)} skipped: {counts}; listed in skipped.csv)" if images else ""

    def write(self, path: Path) -> None:
        """A csv table: file, reason. What no text can hold of a name is written as \\udcxx."""
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(("file", "reason"))
            for start in range(0, len(self), AT_ONCE):
                part = self.table.slice(start, AT_ONCE)
                names = (str(self.root / os.fsdecode(name)) for name in part["path"].to_pylist())
                writer.writerows(zip(names, part["reason"].to_pylist(), strict=True))


@dataclass
class Noted:
    """What a scan finds that is not used, as it comes."""

    tables: list[pa.Table] = field(default_factory=list)
    rows: list[tuple[bytes, str, str]] = field(default_factory=list)

    def add(self, path: bytes, kind: str, reason: str) -> None:
        self.rows.append((path, kind, reason))
        if len(self.rows) == AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self.tables.append(table_of(SCHEMA, [*zip(*self.rows, strict=True)]))
        self.rows.clear()

    def table(self) -> pa.Table:
        if self.rows:
            self._flush()
        return pa.concat_tables(self.tables) if self.tables else SCHEMA.empty_table()


def shown(name: str) -> str:
    """A file's name on one line and in letters that a terminal can show."""
    plain = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)
