"""An index made of parts that are files: shards, tables. What is unchanged since an earlier scan is not read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from nai_xl.data.cache import content_key
from nai_xl.data.images import READER
from nai_xl.data.index import Index, refuse_empty
from nai_xl.data.index_file import built, is_whole, mapped, newest
from nai_xl.data.rows import Rows, Store
from nai_xl.data.skipped import OTHER, SkippedFiles, shown
from nai_xl.data.source import places
from nai_xl.data.source.limits import Choice, Limited, faults, in_order
from nai_xl.data.source.part import SHARD
from nai_xl.errors import UserError, one_line
from nai_xl.files import user_cache

VERSION = 2  # raise it whenever a part holds other rows for the same file and settings
PARTS = "parts"  # of an index file's notes: what each part's rows depend on


@dataclass(frozen=True)
class Gathered:
    """The index file of all parts. where: how messages name them."""

    file: Path
    where: str

    def index(self, limits: Limited, store: Store) -> Index:
        """What is within the limits. Raises UserError where nothing is."""
        whole = mapped(self.file)
        usable = int(whole.schema.metadata[b"usable"])
        choice = Choice(whole.slice(0, usable), limits)
        skipped = in_order([faults(whole.slice(usable)), *choice.skipped])
        listed = SkippedFiles(skipped)
        index = Index(
            choice.of(Rows.mapped(self.file, store)), listed, remarks=[*_no_images(listed), *choice.remarks()]
        )
        refuse_empty(index, self.where)
        return index


def _no_images(skipped: SkippedFiles) -> Iterator[str]:
    """What no count of skipped images tells."""
    if count := len(skipped) - len(skipped.of_images()):
        first = next(row for row in skipped if row.kind in OTHER)
        yield f"not images: {count} entries of skipped.csv, such as {shown(first.path.name)} ({first.reason})"


def gathered(
    key: str,
    settings: Sequence[object],
    files: Sequence[str],
    stamps: Sequence[str],
    read: Callable[[int, str], pa.Table],
) -> Gathered:
    """The index of `files`, of which each is a part with rows `read(its number, its place)` (nai_xl.data.source.part).

    key: the setting that names them. stamps: lines that change with their content. settings: all else that their rows
    depend on. Processes that want the same index make it together. Raises UserError where it cannot be written.
    """
    known = [where if places.is_remote(where) else str(Path(where).absolute()) for where in files]
    names = [content_key(VERSION, READER, *settings, *one) for one in zip(files, known, stamps, strict=True)]
    home = user_cache() / "index" / content_key(VERSION, *settings, str(Path(known[0]).parent))
    file = home / f"{content_key(*names)[:40]}.arrow"
    with _kept_in(home, key):
        if not is_whole(file):
            numbers, rows = _unchanged(home, names)
            missing = (number for number in range(len(names)) if number not in numbers)
            parts = {names[number]: partial(read, number, files[number]) for number in missing}
            built(file, parts, lambda: rows, notes={PARTS: json.dumps(names)}, what=f"reading {key}", unit="files")
    return Gathered(file, f"{key}={places.shown(files[0])}{' ...' if len(files) > 1 else ''}")


@contextmanager
def _kept_in(home: Path, key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot keep the index of {key} in {home} ({one_line(error)}); make room, or choose another place with "
            "the environment variable NAI_XL_CACHE"
        ) from error


def _unchanged(home: Path, names: Sequence[str]) -> tuple[set[int], list[pa.Table]]:
    """Of the newest earlier file: the numbers of the parts that it has as they are now, and their rows."""
    earlier = newest(home)
    if earlier is None:
        return set(), []
    table = mapped(earlier)
    now = {name: number for number, name in enumerate(names)}
    numbers = np.array([now.get(name, -1) for name in json.loads(table.schema.metadata[PARTS.encode()])], np.int32)
    shard = numbers[table[SHARD.name].to_numpy()]
    rows = table.set_column(table.schema.get_field_index(SHARD.name), SHARD, pa.array(shard))
    return {*numbers.tolist()} - {-1}, [rows.filter(pa.array(shard >= 0)).replace_schema_metadata(None)]
