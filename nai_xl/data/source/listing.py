"""What lies in a folder of images: names and stamps, without opening a file."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import IntEnum
from operator import attrgetter
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nai_xl.data.images import SUFFIXES
from nai_xl.data.skipped import Noted, shown

CLOCK = 2.0  # seconds: the step of FAT's times, the coarsest in use
AT_ONCE = 1024  # files that a thread looks at
THREADS = 8  # more than processors: folders on a network answer slowly
PACKED = Struct("=3q").pack  # of length and times
NUMBERS = 6  # of a row of stamps: length, times of change of content and of inode, of the picture and of the caption
METADATA = (b"metadata.jsonl", b"metadata.csv", b"metadata.parquet")
APPLE_DOUBLE = b"._"  # macOS keeps attributes of photo.png in ._photo.png, on disks that have none
HIDDEN = re.compile(rb"\..*|Thumbs\.db|desktop\.ini", re.DOTALL | re.IGNORECASE)  # of systems and programs
ARCHIVES = {"tar": "data=shards", "parquet": "data=table", "arrow": "data=datasets"}


class Kind(IntEnum):
    """Where a caption comes from. SIDECARS has them in the order of precedence, and METADATA comes last."""

    TXT = 0
    CAPTION = 1
    JSON = 2
    METADATA = 3
    TXT_IN_CAPITALS = 4  # numbers stay: index files hold them


SIDECARS = {b".txt": Kind.TXT, b".TXT": Kind.TXT_IN_CAPITALS, b".caption": Kind.CAPTION, b".json": Kind.JSON}
SUFFIX_OF = {kind: suffix for suffix, kind in SIDECARS.items()}


@dataclass
class Listing:
    """Images that have a caption, in the order of their names, and whatever else lies there.

    names: relative to the folder, as bytes. stamps [N,6]: see NUMBERS. kinds [N]: of the captions. tables: files of
    captions for many images; table [N]: which of them, -1 where the caption is a file of its own. twins: pictures that
    share a caption file; doubled: those with several caption files; apart: those with one, where there is a table too:
    names, the first few, and how many there are.
    """

    names: pa.Array
    stamps: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    table: NDArray[np.int32]
    tables: list[bytes]
    noted: Noted
    others: Counter[str]
    twins: Few
    doubled: Few
    apart: Few
    images: int  # with and without captions

    def take(self, where: NDArray[Any]) -> Listing:
        """The images where `where` is true, or of these numbers."""
        numbers = np.flatnonzero(where) if where.dtype == np.bool_ else where
        return replace(
            self,
            names=self.names.take(pa.array(numbers)),
            stamps=self.stamps[numbers],
            kinds=self.kinds[numbers],
            table=self.table[numbers],
        )

    def __len__(self) -> int:
        return len(self.stamps)

    def mark(self) -> str:
        """40 hex characters that change with any name or stamp of an image or of its caption."""
        whole = hashlib.sha256(b"\0".join(self.tables))
        for column in (self.names.buffers()[1], self.names.buffers()[2]):
            whole.update(column or b"")
        for values in (self.stamps, self.kinds, self.table):
            whole.update(values.tobytes())
        return whole.hexdigest()[:40]

    def settled(self, now: float) -> NDArray[np.bool_]:
        """[N]: whether files could not have changed since without showing other times ("racy git",
        https://git-scm.com/docs/racy-git).
        """
        if not len(self):
            return np.zeros(0, np.bool_)
        latest = self.stamps[:, [1, 2, 4, 5]].max(axis=1)
        settled: NDArray[np.bool_] = latest < (now - CLOCK) * 1e9
        return settled


@dataclass
class Few:
    """A count and the first examples."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < 3:
            self.names.append(name)


@dataclass
class _Found:
    """What a walk has gathered so far, as arrays."""

    names: list[pa.Array] = field(default_factory=list)
    stamps: list[NDArray[np.int64]] = field(default_factory=list)
    kinds: list[NDArray[np.uint8]] = field(default_factory=list)
    table: list[NDArray[np.int32]] = field(default_factory=list)
    tables: list[bytes] = field(default_factory=list)
    noted: Noted = field(default_factory=Noted)
    others: Counter[str] = field(default_factory=Counter)
    twins: Few = field(default_factory=Few)
    doubled: Few = field(default_factory=Few)
    apart: Few = field(default_factory=Few)
    images: int = 0

    def listing(self) -> Listing:
        names = pa.concat_arrays([pa.array([], pa.binary()), *self.names])
        return Listing(
            names,
            np.concatenate([np.zeros((0, NUMBERS), np.int64), *self.stamps]),
            np.concatenate([np.zeros(0, np.uint8), *self.kinds]),
            np.concatenate([np.zeros(0, np.int32), *self.table]),
            self.tables,
            self.noted,
            self.others,
            self.twins,
            self.doubled,
            self.apart,
            self.images,
        )


@dataclass(frozen=True)
class _Place:
    """A folder below the one that is searched: its name there, and the table of captions that is in force."""

    name: bytes
    table: int = -1
    stamp: bytes = b""


def list_folder(folder: Path, *, max_caption: int) -> Listing:
    """Everything below `folder`. Linked folders are followed, each folder once.

    max_caption: bytes; images with a longer caption file are noted and left out. Raises OSError for `folder` itself.
    """
    found, seen = _Found(), {_identity(os.fsencode(folder))}
    root = os.fsencode(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        waiting, links = [_Place(b"")], list[_Place]()
        while waiting or links:  # links come last, so that a folder keeps the name it has itself
            linked = not waiting
            place = links.pop(0) if linked else waiting.pop()
            if linked and not _is_new(root, place, seen, found):
                continue
            folders, linked_folders = _look_into(root, place, found, pool, max_caption)
            for each in folders:
                seen.add(_identity(os.path.join(root, each.name)))  # noqa: PTH118 - names are bytes
            waiting += reversed(folders)
            links += linked_folders
    return found.listing()


def _identity(path: bytes) -> tuple[int, int] | None:
    try:
        there = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return there.st_dev, there.st_ino


def _is_new(root: bytes, place: _Place, seen: set[tuple[int, int] | None], found: _Found) -> bool:
    identity = _identity(os.path.join(root, place.name))  # noqa: PTH118
    if identity in seen:
        found.noted.add(place.name, "link", "a link to a folder that is searched already")
        return False
    seen.add(identity)
    return True


def _look_into(
    root: bytes, place: _Place, found: _Found, pool: ThreadPoolExecutor, max_caption: int
) -> tuple[list[_Place], list[_Place]]:
    """Add what lies in one folder; the folders in it, and those that are linked."""
    prefix = place.name + b"/" if place.name else b""
    try:
        with os.scandir(os.path.join(root, place.name)) as entries:  # noqa: PTH118
            every = sorted(entries, key=attrgetter("name"))
    except OSError as error:
        if not place.name:
            raise
        found.noted.add(place.name, "unreadable folder", f"a folder that cannot be read: {error.strerror}")
        return [], []
    parts = [every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE)]
    here = _Files()
    for part in pool.map(_sorted_out, parts):
        here.add(part)
    for name, kind, reason in here.bad:
        found.noted.add(prefix + name, kind, reason)
    table, stamp = place.table, place.stamp
    named = [name for name in METADATA if name in here.texts]
    if named:
        table, stamp = len(found.tables), here.texts.pop(named[0])
        found.tables.append(prefix + named[0])
        for name in named[1:]:
            del here.texts[name]
            found.noted.add(prefix + name, "caption", f"{named[0].decode()} is read instead")
    _pair(prefix, here, table, stamp, found, max_caption)
    return (
        [_Place(prefix + name, table, stamp) for name in here.folders],
        [_Place(prefix + name, table, stamp) for name in here.links],
    )


@dataclass
class _Files:
    """Of one folder: images as (name, stem, stamp), files of captions with their stamps, and what else is there."""

    images: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    texts: dict[bytes, bytes] = field(default_factory=dict)
    others: list[tuple[bytes, bytes]] = field(default_factory=list)  # with their suffixes
    folders: list[bytes] = field(default_factory=list)
    links: list[bytes] = field(default_factory=list)
    bad: list[tuple[bytes, str, str]] = field(default_factory=list)

    def add(self, more: _Files) -> None:
        self.images += more.images
        self.texts |= more.texts
        self.others += more.others
        self.folders += more.folders
        self.links += more.links
        self.bad += more.bad


def _sorted_out(entries: Iterable[os.DirEntry[bytes]]) -> _Files:
    files = _Files()
    for entry in entries:
        name = entry.name
        try:
            if entry.is_dir():
                (files.links if entry.is_symlink() else files.folders).append(name)
                continue
            point = name.rfind(b".")
            suffix = name[point:] if point > 0 else b""
            image = suffix in _IMAGES or suffix.lower() in _IMAGES
            if name.startswith(APPLE_DOUBLE) or not (image or suffix in SIDECARS or name in METADATA):
                files.others.append((name, suffix))
                continue
            there = entry.stat()
        except OSError as error:
            reason = "a link that leads to itself" if error.errno == errno.ELOOP else "a link to nothing"
            reason = reason if entry.is_symlink() else f"cannot be looked at: {error.strerror}"
            files.bad.append((name, "link", reason))
            continue
        if not stat.S_ISREG(there.st_mode):
            files.bad.append((name, "no file", "not a regular file"))
            continue
        stamp = PACKED(there.st_size, there.st_mtime_ns, there.st_ctime_ns)
        if image:
            files.images.append((name, name[:point], stamp))
        else:
            files.texts[name] = stamp
    return files


_IMAGES = frozenset(f".{suffix}".encode() for suffix in SUFFIXES)


def _pair(prefix: bytes, files: _Files, table: int, table_stamp: bytes, found: _Found, max_caption: int) -> None:
    """Add the images of one folder, each with the caption that comes first."""
    there = {name[name.rfind(b".") :] for name in files.texts}
    ends = [(kind, end) for end, kind in SIDECARS.items() if end in there]
    names: list[bytes] = []
    kinds: list[int] = []
    stamps = bytearray()
    used: dict[bytes, bytes] = {}  # caption file -> its first picture
    unused = set(files.texts)
    for name, stem, stamp in files.images:
        captions = [(kind, text) for kind, end in ends if (text := stem + end) in files.texts]
        if captions:
            kind, text = captions[0]
            caption = files.texts[text]
            if text in used:
                found.twins.add(f"{_shown(prefix + used[text])} and {_shown(name)}")
            else:
                used[text] = name
                unused.discard(text)
            if len(captions) > 1:
                found.doubled.add(_shown(prefix + name))
            if table >= 0:
                found.apart.add(_shown(prefix + name))
        elif table >= 0:
            kind, caption = Kind.METADATA, table_stamp
        else:
            found.noted.add(prefix + name, "no caption", f"no caption file {_shown(stem)}.txt")
            continue
        names.append(prefix + name)
        kinds.append(kind)
        stamps += stamp
        stamps += caption
    found.images += len(files.images)
    _add(names, kinds, stamps, table, found, max_caption)
    _note_the_rest(prefix, files, unused, found)


def _add(names: list[bytes], kinds: list[int], stamps: bytearray, table: int, found: _Found, max_caption: int) -> None:
    """Add images with their captions, less those with a caption file that is too long to be read."""
    rows = np.frombuffer(stamps, np.int64).reshape(-1, NUMBERS)
    source = np.array(kinds, np.uint8)
    long = (rows[:, 3] > max_caption) & (source != Kind.METADATA)
    for number in np.flatnonzero(long):
        reason = f"caption file of {rows[number, 3]} bytes; data.max_caption is {max_caption}"
        found.noted.add(names[number], "caption too long", reason)
    array = pa.array(names, pa.binary())
    found.names.append(array.filter(pa.array(~long)) if long.any() else array)
    found.stamps.append(rows[~long])
    found.kinds.append(source[~long])
    found.table.append(np.where(source[~long] == Kind.METADATA, table, -1).astype(np.int32))


def _note_the_rest(prefix: bytes, files: _Files, unused: set[bytes], found: _Found) -> None:
    pictures = {stem for _, stem, _ in files.images} if unused else set()
    for name in sorted(unused):
        shadowed = name[: name.rfind(b".")] in pictures
        reason = "another caption of its image comes first" if shadowed else "a caption without an image of its name"
        found.noted.add(prefix + name, "caption", reason)
    for name, suffix in files.others:
        if HIDDEN.fullmatch(name):
            found.noted.add(prefix + name, "hidden", "a hidden file")
            continue
        kind = suffix[1:].lower().decode(errors="backslashreplace")
        found.others[kind] += 1
        found.noted.add(prefix + name, "other", _about(kind))


def _about(kind: str) -> str:
    option = ARCHIVES.get(kind)
    return f"an archive, which {option} reads" if option else "not an image"


def _shown(name: bytes) -> str:
    return shown(os.fsdecode(name))


def wait_for_clock(found: Listing) -> bool:
    """Whether it was worth waiting until all files are settled: none has a time in the future. At most CLOCK."""
    if not len(found):
        return True
    now = time.time()
    left = found.stamps[:, [1, 2, 4, 5]].max() / 1e9 + CLOCK - now
    if left > CLOCK:
        return False
    time.sleep(max(left, 0.0) + 0.01)
    return True


def parts_of(found: Listing, size: int) -> Iterator[Listing]:
    """`found`, `size` images at a time."""
    numbers = np.arange(len(found))
    return (found.take(numbers[start : start + size]) for start in range(0, len(found), size))
