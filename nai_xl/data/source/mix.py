"""data=mix: several sources as one data set, each as often as is said."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from nai_xl.data.index import Index, OnChange, are_held_out
from nai_xl.data.rows import Rows, Store
from nai_xl.data.skipped import SCHEMA, SkippedFiles
from nai_xl.data.source import Share
from nai_xl.errors import UserError

SOURCE = "source"  # column: the number of an image's source
ADDING = "+data@data.sources.NAME=folder data.sources.NAME.dir=DIR"


def _some(sources: Mapping[str, Any]) -> Mapping[str, Any]:
    if not sources:
        raise ValueError(f"there is none; add one with {ADDING}")
    return sources


@dataclass(frozen=True)
class MixSource:
    """`sources`: a name -> a source. `repeats`: a name -> how often each image of it stands in an epoch, 1 by default.

    Of 2.5 times the half is a share of the images, chosen by their content. An image that a source holds out is trained
    on from no other; `held_out` holds out more, over all of them. `on_change` is asked of the mix, and not of a source.
    """

    without_effect: ClassVar[tuple[str, ...]] = ("on_change",)  # on which run it is

    sources: Annotated[Mapping[str, Any], AfterValidator(_some)]
    repeats: Mapping[str, Annotated[float, Field(ge=0, le=1000)]] = field(default_factory=dict)
    held_out: Share = 0.0
    on_change: OnChange = "refuse"

    def __post_init__(self) -> None:
        for name in self.repeats:
            if name not in self.sources:
                raise ValueError(f"repeats.{name}: no such source; there is {', '.join(self.sources)}")
        for name, source in self.sources.items():
            if not hasattr(source, "scan") or isinstance(source, MixSource):
                raise ValueError(f"sources.{name}: no source of images; add one with {ADDING.replace('NAME', name)}")

    def scan(self) -> Index:
        found = [self._scanned(name, source) for name, source in self.sources.items()]
        mixed = _Mixed.of(found, [float(self.repeats.get(name, 1)) for name in self.sources])
        items, held_out = mixed.parted(self.held_out)
        if not items:
            raise UserError("data: nothing is left to train on; set a smaller data.held_out, or other data.repeats")
        remarks = [
            f"{name}: {_at(name, source, remark)}"
            for (name, source), index in zip(self.sources.items(), found, strict=True)
            for remark in index.remarks
        ]
        said = [*self._said(found, mixed), *remarks]
        return Index(items, self._skipped(found), held_out, said, self.on_change)

    def _scanned(self, name: str, source: Any) -> Index:
        try:
            index: Index = source.scan()
        except UserError as error:
            raise UserError(_at(name, source, str(error))) from error
        if any(item.drawn is not None or (item.store and index.items.given) for item in index.items[:1]):
            raise UserError(
                f"data.sources.{name}: its images are made by itself, and data=mix takes only what is stored"
            )
        return index

    def _skipped(self, found: Sequence[Index]) -> SkippedFiles:
        tables = [
            _whole_paths(index.skipped.table, index.skipped.root).set_column(
                2,
                SCHEMA.field("reason"),
                pc.replace_substring_regex(index.skipped.table["reason"], *_keys(name, source)),
            )
            for (name, source), index in zip(self.sources.items(), found, strict=True)
        ]
        return SkippedFiles(pa.concat_tables(tables))

    def _said(self, found: Sequence[Index], mixed: _Mixed) -> Iterator[str]:
        for name, index in zip(self.sources, found, strict=True):
            yield f"{name}: {len(index.items)} images, each {self.repeats.get(name, 1):g} times an epoch"
        if twice := mixed.in_several():
            yield f"{twice} images are in several sources, and are trained on from each"


def _keys(name: str, source: Any) -> tuple[str, str]:
    """A pattern of the source's own settings as its messages name them, and what names them in a mix."""
    settings = "|".join(inspect.signature(type(source)).parameters)
    return rf"\bdata\.({settings})\b", rf"data.sources.{name}.\1"


def _at(name: str, source: Any, message: str) -> str:
    return re.sub(*_keys(name, source), message)


@dataclass(frozen=True)
class _Mixed:
    """All images of all sources, in the order of an index. held: whether a source holds it out. times: in an epoch."""

    rows: Rows
    held: NDArray[np.bool_]
    times: NDArray[np.int64]
    group: NDArray[np.int64]  # the number of the content: equal images have the same one

    @classmethod
    def of(cls, found: Sequence[Index], repeats: Sequence[float]) -> _Mixed:
        parts = [rows for index in found for rows in (index.items, index.held_out)]
        number = np.repeat(np.arange(len(parts), dtype=np.int16), [len(rows) for rows in parts])
        rows = _joined([(rows, place // 2) for place, rows in enumerate(parts)])
        rows = Rows(rows.table, MixStore(tuple(index.items.store for index in found)), picked=rows.picked)
        order = rows.order()
        rows, number = rows.take(order), number[order]
        contents = rows.contents
        new = np.ones(len(rows), np.bool_)
        new[1:] = (contents[1:] != contents[:-1]).any(axis=1)
        group = np.cumsum(new) - 1
        held = np.bincount(group, weights=number % 2 == 1)[group] > 0 if len(rows) else new
        return cls(rows, held, _times(contents, np.array(repeats)[number // 2]), group)

    def parted(self, share: float) -> tuple[Rows, Rows]:
        """What is trained on, as often as is said, and what is not: the images held out, and a share of the others."""
        held = self.held | are_held_out(self.rows.contents, share)
        times = np.where(held, 0, self.times)
        return self.rows.take(np.repeat(np.arange(len(times)), times)), self.rows.take(np.flatnonzero(held))

    def in_several(self) -> int:
        """How many contents several sources have."""
        source = self.rows.column(SOURCE).to_numpy()
        pairs = np.unique(np.stack([self.group, source]), axis=1)
        return int((np.bincount(pairs[0]) > 1).sum())


def _times(contents: NDArray[np.uint8], repeats: NDArray[np.float64]) -> NDArray[np.int64]:
    """[N] whole numbers whose mean is `repeats`; the same image has always the same one."""
    whole = np.floor(repeats)
    more = np.zeros(len(repeats), np.bool_)
    for share in np.unique(repeats - whole):
        # by other bytes than those that hold out
        more |= are_held_out(contents[:, 8:], float(share)) & (repeats - whole == share)
    return (whole + more).astype(np.int64)


def _joined(parts: Sequence[tuple[Rows, int]]) -> Rows:
    """The images of all parts, each with the number of its source. Columns of mapped files stay where they are."""
    tables: list[pa.Table] = []
    begins: dict[int, int] = {}  # a table -> the number of its first row; held-out images have that of the others
    picked = []
    for rows, source in parts:
        if id(rows.table) not in begins:
            begins[id(rows.table)] = sum(map(len, tables))
            number = pa.array(np.full(len(rows.table), source, np.int16))
            tables.append(_whole_paths(rows.table, rows.root).append_column(SOURCE, number))
        numbers = np.arange(len(rows.table), dtype=np.uint32) if rows.picked is None else rows.picked
        picked.append(numbers + np.uint32(begins[id(rows.table)]))
    whole = pa.concat_tables(tables, promote_options="default")
    return Rows(whole, picked=np.concatenate(picked))


def _whole_paths(table: pa.Table, root: Path) -> pa.Table:
    """The table with paths that begin at no folder of its own."""
    if root == Path():
        return table
    paths = pc.binary_join_element_wise(os.fsencode(root), table["path"], b"/")
    return table.set_column(table.column_names.index("path"), "path", paths)


@dataclass(frozen=True)
class MixStore:
    """The stores of several sources, by the column `source`; None: images are files."""

    stores: tuple[Store | None, ...]

    def open(self, row: dict[str, Any]) -> BinaryIO:
        store = self.stores[row[SOURCE]]
        return Path(os.fsdecode(row["path"])).open("rb") if store is None else store.open(row)
