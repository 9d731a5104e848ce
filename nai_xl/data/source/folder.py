"""data=folder: a folder of images with their captions in files beside them or in tables."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator

from nai_xl.data import index_file
from nai_xl.data.cache import content_key
from nai_xl.data.images import READER
from nai_xl.data.index import Index, refuse_empty
from nai_xl.data.rows import Rows, ordered
from nai_xl.data.skipped import OTHER, SkippedFiles, shown
from nai_xl.data.source.caption_files import Tables
from nai_xl.data.source.limits import Choice, Encoding, Limited, faults, in_order
from nai_xl.data.source.listing import ARCHIVES, Few, Listing, list_folder, parts_of, wait_for_clock
from nai_xl.data.source.reading import FACTS, Known, Reader, known
from nai_xl.errors import UserError
from nai_xl.files import user_cache

VERSION = 4  # raise it whenever what a scan reads of a file changes
PART = 4096  # images in a part: what a killed scan may lose
HOW = (
    "a folder of images, each with a caption in a .txt, .caption or .json file of the same name or in a "
    "metadata.jsonl, .csv or .parquet"
)


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{'a file and no' if path.exists() else 'no such'} folder; give {HOW}")
    return path


@dataclass(frozen=True)
class FolderSource(Limited):
    """A folder, searched recursively, of images with captions in files of the same name or in tables: docs/data.md."""

    dir: Annotated[Path, AfterValidator(_existing)]
    caption_lines: bool = False
    encoding: Encoding = "utf-8"

    def scan(self) -> Index:
        """What an earlier scan read and is unchanged is not opened again."""
        now = time.time()
        listing = list_folder(self.dir, max_caption=self.max_caption)
        if not listing.images:
            instead = _found_instead(listing)
            raise UserError(f"data.dir={self.dir}: no images in this folder{instead}. Set data.dir to {HOW}")
        if len(listing) > PART and not listing.settled(now).all() and wait_for_clock(listing):
            now = time.time()  # so that all of it can be kept
            listing = list_folder(self.dir, max_caption=self.max_caption)
        root = os.fsencode(self.dir)
        reader = Reader(root, self.encoding, self.caption_lines, Tables(root, listing.tables, self.encoding))
        key = content_key(VERSION, self.dir.resolve(), self.encoding, self.caption_lines)
        facts = gathered(user_cache() / "index" / key, listing, now, reader)
        index = _chosen(self.dir, listing, facts, self)
        refuse_empty(index, f"data.dir={self.dir}")
        return self.settled(index)


def scan(folder: Path, **settings: Any) -> Index:
    """The index of a folder, for sources that write one. settings: those of FolderSource."""
    return FolderSource(folder, **settings).scan()


def _found_instead(listing: Listing) -> str:
    archives = [f"{count} .{kind}, which {ARCHIVES[kind]} reads" for kind, count in _archives(listing)]
    return f", but {' and '.join(archives)}" if archives else ""


def _archives(listing: Listing) -> Iterable[tuple[str, int]]:
    return ((kind, count) for kind, count in listing.others.most_common() if kind in ARCHIVES)


# --- what is known of the files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """Of all listed images: the usable ones in their order, and the others. file: where the former are mapped from."""

    usable: pa.Table
    faulty: pa.Table
    file: Path | None = None


def gathered(place: Path, listing: Listing, now: float, reader: Reader) -> Facts:
    """What the index in `place` says of these images; it is made, or made anew, where it lacks any.

    Files that may still change without showing other times are read at every start, and not kept. now: when the
    listing began.
    """
    settled = listing.settled(now)
    lasting = listing if settled.all() else listing.take(settled)
    whole, file = FACTS.empty_table(), None
    if len(lasting):
        try:
            file = _kept(place, lasting, reader)
            whole = index_file.mapped(file)
        except OSError:  # a cache that cannot be written
            whole = reader.read(lasting, Known.nothing(len(lasting)))
    usable, faulty = _parted(whole)
    again = _to_be_read_again(lasting, faulty)
    if len(again):
        faulty = faulty.filter(pc.invert(pc.is_in(faulty["path"], again.names)))
    fresh = [part for part in (again, listing.take(~settled)) if len(part)]
    if not fresh:
        return Facts(usable, faulty, file)
    read = [_parted(table) for part in fresh for table in _read_each_time(part, reader)]
    faulty = pa.concat_tables([faulty, *(bad for _, bad in read)])
    more = [good for good, _ in read if len(good)]
    if not more:
        return Facts(usable, faulty, file)
    together = pa.concat_tables([usable, *more]).combine_chunks()
    return Facts(together.take(pa.array(ordered(together))), faulty)


def _kept(place: Path, listing: Listing, reader: Reader) -> Path:
    """The index file of this listing, made together with whoever else wants it."""
    file = place / f"{content_key(READER, listing.mark())[:40]}.arrow"
    if index_file.is_whole(file):
        return file
    newest = index_file.newest(place)
    before = index_file.mapped(newest) if newest else FACTS.empty_table()
    found = known(before, listing)
    changed = np.flatnonzero(found.whole < 0)
    parts, each = list(parts_of(listing.take(changed), PART)), found.take(changed)

    def make(number: int) -> pa.Table:
        mine = np.arange(number * PART, number * PART + len(parts[number]))
        return reader.read(parts[number], each.take(mine))

    makes = {part.mark(): (lambda number=number: make(number)) for number, part in enumerate(parts)}
    return index_file.built(
        file,
        makes,
        lambda: [before.take(pa.array(found.whole[found.whole >= 0])).replace_schema_metadata(None)],
        notes={"reader": READER},
        sizes=[len(part) for part in parts],
    )


def _read_each_time(listing: Listing, reader: Reader) -> Iterator[pa.Table]:
    """Of files that no index keeps."""
    with index_file.bar("reading the images that are new", "images", [len(listing)]) as shown:
        for part in parts_of(listing, PART):
            yield reader.read(part, Known.nothing(len(part)))
            shown.update(len(part))


def _parted(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The usable rows in the order of an index, and the others."""
    noted = (table.schema.metadata or {}).get(b"usable")
    if noted is not None:
        return table.slice(0, int(noted)), table.slice(int(noted))
    count = len(table) - table["content"].null_count
    whole = table.take(pa.array(ordered(table)))
    return whole.slice(0, count), whole.slice(count)


def _to_be_read_again(listing: Listing, faulty: pa.Table) -> Listing:
    passing = faulty.filter(pc.equal(faulty["_stamp"], pa.scalar(bytes(48), FACTS.field("_stamp").type)))
    if not len(passing):
        return listing.take(np.zeros(len(listing), np.bool_))
    return listing.take(pc.is_in(listing.names, value_set=passing["path"].combine_chunks()).to_numpy(False))


# --- what is used of them ---------------------------------------------------------------------------------------------


def _chosen(folder: Path, listing: Listing, facts: Facts, limits: Limited) -> Index:
    choice = Choice(facts.usable, limits)
    skipped = in_order([listing.noted.table(), faults(facts.faulty), *choice.skipped])
    rows = choice.of(_rows(facts, folder))
    return Index(rows, SkippedFiles(skipped, folder), remarks=[*_remarks(listing), *choice.remarks()])


def _rows(facts: Facts, folder: Path) -> Rows:
    if facts.file is not None:
        return Rows.mapped(facts.file, root=folder)
    plain = [name for name in facts.usable.column_names if not name.startswith("_")]
    return Rows(facts.usable.select(plain), root=folder)


# --- what is said of it -----------------------------------------------------------------------------------------------


def _remarks(listing: Listing) -> Iterable[str]:
    """What is not as one may expect, each once with its count."""
    every = sorted(listing.others.items(), key=lambda pair: (-pair[1], pair[0]))
    others = [(kind, n) for kind, n in every if kind not in ARCHIVES]
    if plain := [f"{n} .{shown(kind)}" if kind else f"{n} without a suffix" for kind, n in others[:8]]:
        more = len(others) - len(plain)
        yield f"not images: {', '.join(plain)}{f' and {more} more kinds' if more > 0 else ''}; listed in skipped.csv"
    for kind, count in _archives(listing):
        yield f"{count} .{kind} in data.dir not read; {ARCHIVES[kind]} is for them"
    kinds = SkippedFiles(listing.noted.table()).counts()
    if count := sum(kinds.get(kind, 0) for kind in OTHER if kind not in ("other", "hidden")):
        yield f"{count} links, captions and special files were of no use; listed in skipped.csv"
    if count := listing.twins.count:
        yield f"{count} images have the caption file of another, and its caption: {_examples(listing.twins)}"
    if count := listing.doubled.count:
        yield (
            f"{count} images have captions in several files, of which .txt comes before .caption and .json: "
            f"{_examples(listing.doubled)}"
        )
    if count := listing.apart.count:
        yield (
            f"{count} images have a caption file of their own, which comes before metadata.jsonl, .csv or .parquet: "
            f"{_examples(listing.apart)}"
        )


def _examples(few: Few) -> str:
    return ", ".join(few.names) + (", ..." if few.count > len(few.names) else "")
