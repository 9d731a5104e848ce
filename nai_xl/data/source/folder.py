"""data=folder: a folder of images with their captions in files beside them or in tables."""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from nai_xl.data import index_file
from nai_xl.data.cache import content_key
from nai_xl.data.colour import Profile
from nai_xl.data.images import READER
from nai_xl.data.index import Index, OnChange, refuse_empty
from nai_xl.data.rows import Rows
from nai_xl.data.skipped import OTHER, SCHEMA, SkippedFiles, shown
from nai_xl.data.source import Share
from nai_xl.data.source.caption_files import Tables
from nai_xl.data.source.listing import ARCHIVES, Few, Listing, list_folder, parts_of, wait_for_clock
from nai_xl.data.source.reading import FACTS, Known, Reader, known
from nai_xl.errors import UserError
from nai_xl.files import user_cache

VERSION = 2  # raise it whenever what a scan reads of a file changes
PART = 4096  # images in a part: what a killed scan may lose
HOW = (
    "a folder of images, each with a caption in a .txt, .caption or .json file of the same name or in a "
    "metadata.jsonl, .csv or .parquet"
)


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"no such folder; give {HOW}")
    return path


def _encoding(name: str) -> str:
    try:
        return codecs.lookup(name).name
    except LookupError as error:
        raise ValueError(f"no encoding has the name {name!r}; give one such as utf-8, cp1252 or shift_jis") from error


@dataclass(frozen=True)
class FolderSource:
    """A folder, searched recursively, of images with captions in files of the same name or in tables: docs/data.md.

    `held_out` is the share of them that is never trained on, for evaluators. Images of more than `max_megapixels`
    million pixels, which take 8 MB of memory for each million while they are read, and those with a caption of more
    than `max_caption` bytes are skipped, and listed with the rest.
    """

    without_effect: ClassVar[tuple[str, ...]] = ("on_change",)  # on which run it is

    dir: Annotated[Path, AfterValidator(_existing)]
    min_side: int = 16
    held_out: Share = 0.0
    max_megapixels: Annotated[float, Field(gt=0)] = 100.0
    max_caption: Annotated[int, Field(ge=1)] = 65536
    caption_lines: bool = False
    blank_captions: Literal["keep", "skip"] = "keep"
    encoding: Annotated[str, AfterValidator(_encoding)] = "utf-8"
    on_change: OnChange = "refuse"

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
        limits = Limits(self.min_side, self.max_megapixels, self.max_caption, self.blank_captions == "skip")
        index = _chosen(self.dir, listing, facts, limits)
        refuse_empty(index, f"data.dir={self.dir}")
        index.on_change = self.on_change
        return index.hold_out(self.held_out)


@dataclass(frozen=True)
class Limits:
    """What is skipped: a smaller side in pixels, more million pixels, more bytes of a caption, blank captions."""

    min_side: int
    max_megapixels: float
    max_caption: int
    blank: bool = False


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
    read = [_parted(reader.read(part, Known.nothing(len(part)))) for part in fresh]
    faulty = pa.concat_tables([faulty, *(bad for _, bad in read)])
    more = [good for good, _ in read if len(good)]
    if not more:
        return Facts(usable, faulty, file)
    together = pa.concat_tables([usable, *more]).combine_chunks()
    return Facts(together.take(pa.array(index_file.ordered(together))), faulty)


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


def _parted(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The usable rows in the order of an index, and the others."""
    noted = (table.schema.metadata or {}).get(b"usable")
    if noted is not None:
        return table.slice(0, int(noted)), table.slice(int(noted))
    count = len(table) - table["content"].null_count
    whole = table.take(pa.array(index_file.ordered(table)))
    return whole.slice(0, count), whole.slice(count)


def _to_be_read_again(listing: Listing, faulty: pa.Table) -> Listing:
    passing = faulty.filter(pc.equal(faulty["_stamp"], pa.scalar(bytes(48), FACTS.field("_stamp").type)))
    if not len(passing):
        return listing.take(np.zeros(len(listing), np.bool_))
    return listing.take(pc.is_in(listing.names, value_set=passing["path"].combine_chunks()).to_numpy(False))


# --- what is used of them ---------------------------------------------------------------------------------------------


@dataclass
class _Choice:
    """Which usable rows are within the limits, and the skipped ones with their reasons."""

    table: pa.Table
    kept: NDArray[np.bool_] = field(init=False)
    skipped: list[pa.Table] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept = np.ones(len(self.table), np.bool_)

    def skip(self, where: NDArray[np.bool_], kind: str, words: pa.Array, reason: str) -> None:
        """words: the beginning of the reason for each row of the table."""
        where = where & self.kept
        if where.any():
            mask = pa.array(where)
            reasons = pc.binary_join_element_wise(words.filter(mask), reason, "; ")
            self.skipped.append(_reasoned(self.table["path"].filter(mask), kind, reasons))
            self.kept &= ~where


def _reasoned(paths: pa.Array, kind: str, reasons: pa.Array) -> pa.Table:
    return pa.table([paths, pa.array([kind] * len(paths), pa.string()), reasons], schema=SCHEMA)


def _chosen(folder: Path, listing: Listing, facts: Facts, limits: Limits) -> Index:
    table, choice = facts.usable, _Choice(facts.usable)
    width, height = (table[name].to_numpy().astype(np.int64) for name in ("width", "height"))
    size = _joined(table["width"], "x", table["height"], " pixels")
    choice.skip(np.minimum(width, height) < limits.min_side, "too small", size, f"data.min_side is {limits.min_side}")
    choice.skip(
        width * height > limits.max_megapixels * 1e6,
        "too large",
        size,
        f"data.max_megapixels is {limits.max_megapixels:g}",
    )
    longest = table["_longest"].to_numpy()
    caption = _joined("caption of ", table["_longest"], " bytes")
    choice.skip(longest > limits.max_caption, "caption too long", caption, f"data.max_caption is {limits.max_caption}")
    if limits.blank:
        blank = pa.chunked_array([pa.array(["blank caption"] * len(table), pa.string())])
        choice.skip(longest == 0, "blank caption", blank, "data.blank_captions is skip")
    faults = facts.faulty.select(["path", "_kind", "_fault"]).rename_columns(SCHEMA.names)
    skipped = pa.concat_tables([listing.noted.table(), faults.replace_schema_metadata(None), *choice.skipped])
    skipped = skipped.take(pc.sort_indices(skipped["path"]))
    rows = _rows(facts, folder)
    rows = rows if choice.kept.all() else rows.take(np.flatnonzero(choice.kept))
    return Index(rows, SkippedFiles(skipped, folder), remarks=[*_remarks(listing, facts.usable, choice.kept)])


def _joined(*parts: pa.ChunkedArray | str) -> pa.ChunkedArray:
    words = [part if isinstance(part, str) else part.cast(pa.string()) for part in parts]
    return pc.binary_join_element_wise(*words, "")


def _rows(facts: Facts, folder: Path) -> Rows:
    if facts.file is not None:
        return Rows.mapped(facts.file, root=folder)
    plain = [name for name in facts.usable.column_names if not name.startswith("_")]
    return Rows(facts.usable.select(plain), root=folder)


# --- what is said of it -----------------------------------------------------------------------------------------------


def _remarks(listing: Listing, table: pa.Table, kept: NDArray[np.bool_]) -> Iterable[str]:
    """What is not as one may expect, each once with its count."""
    every = sorted(listing.others.items(), key=lambda pair: (-pair[1], pair[0]))
    others = [(kind, n) for kind, n in every if kind not in ARCHIVES]
    if plain := [f"{n} .{shown(kind)}" if kind else f"{n} without a suffix" for kind, n in others[:8]]:
        more = len(others) - len(plain)
        yield f"not images: {', '.join(plain)}{f' and {more} more kinds' if more > 0 else ''}; listed in skipped.csv"
    for kind, count in _archives(listing):
        yield f"{count} .{kind} in data.dir not read; {ARCHIVES[kind]} is for them"
    kinds = SkippedFiles(listing.noted.table()).counts()
    if count := sum(kinds.get(kind, 0) for kind in OTHER if kind != "other"):
        yield f"{count} links, captions and special files were of no use; listed in skipped.csv"
    if count := listing.twins.count:
        yield f"{count} images have the caption file of another, and its caption: {_examples(listing.twins)}"
    if count := listing.doubled.count:
        yield (
            f"{count} images have captions in several files, of which .txt comes before .caption and .json: "
            f"{_examples(listing.doubled)}"
        )
    if blank := int(((table["_longest"].to_numpy() == 0) & kept).sum()):
        yield f"{blank} images have a blank caption and are trained with it; data.blank_captions=skip leaves them out"
    profiles = np.bincount(table["_profile"].to_numpy()[kept], minlength=len(Profile))
    if count := int(profiles[Profile.CONVERTED]):
        yield f"{count} images have a colour profile of their own and are converted to sRGB"
    if count := int(profiles[Profile.DAMAGED]):
        yield f"{count} images have a damaged colour profile, which is ignored"


def _examples(few: Few) -> str:
    return ", ".join(few.names) + (", ..." if few.count > len(few.names) else "")
