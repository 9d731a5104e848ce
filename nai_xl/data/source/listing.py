"""What lies in a folder of images: names and stamps, without opening a file."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nai_xl.data.images import SUFFIXES
from nai_xl.data.skipped import Noted

CLOCK = 2.0  # seconds: the step of FAT's times, the coarsest in use
AT_ONCE = 1024  # files that a thread looks at
THREADS = 8  # more than processors: folders on a network answer slowly
NUMBERS = 6  # of a row of stamps: length, times of change of content and of inode, of the picture and of the caption
METADATA = (b"metadata.jsonl", b"metadata.csv", b"metadata.parquet")
ARCHIVES = {"tar": "data=shards", "parquet": "data=table", "arrow": "data=datasets"}

Stamp = tuple[int, int, int]


class Kind(IntEnum):
    """Where a caption comes from, in the order of precedence."""

    TXT = 0
    CAPTION = 1
    JSON = 2
    METADATA = 3


SIDECARS = {b".txt": Kind.TXT, b".caption": Kind.CAPTION, b".json": Kind.JSON}
SUFFIX_OF = {kind: suffix for suffix, kind in SIDECARS.items()}


@dataclass
class Listing:
    """Images that have a caption, in the order of their names, and whatever else lies there.

    names: relative to the folder, as bytes. stamps [N,6]: see NUMBERS. kinds [N]: of the captions. tables: files of
    captions for many images; table [N]: which of them, -1 where the caption is a file of its own. twins: pictures that
    share a caption file; doubled: those with captions in several places: names, the first few, and how many there are.
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
    images: int  # with and without captions

    def take(self, where: NDArray[Any]) -> Listing:
        """The images where `where` is true, or of these numbers."""
        numbers = np.flatnonzero(where) if where.dtype == np.bool_ else where
        return Listing(
            self.names.take(pa.array(numbers)),
            self.stamps[numbers],
            self.kinds[numbers],
            self.table[numbers],
            self.tables,
            self.noted,
            self.others,
            self.twins,
            self.doubled,
            self.images,
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
    stamps: array[int] = field(default_factory=lambda: array("q"))
    kinds: bytearray = field(default_factory=bytearray)
    table: array[int] = field(default_factory=lambda: array("i"))
    tables: list[bytes] = field(default_factory=list)
    noted: Noted = field(default_factory=Noted)
    others: Counter[str] = field(default_factory=Counter)
    twins: Few = field(default_factory=Few)
    doubled: Few = field(default_factory=Few)
    images: int = 0

    def listing(self) -> Listing:
        names = pa.concat_arrays([pa.array([], pa.binary()), *self.names])
        return Listing(
            names,
            np.frombuffer(self.stamps, np.int64).reshape(-1, NUMBERS),
            np.frombuffer(self.kinds, np.uint8),
            np.frombuffer(self.table, np.int32),
            self.tables,
            self.noted,
            self.others,
            self.twins,
            self.doubled,
            self.images,
        )


@dataclass(frozen=True)
class _Place:
    """A folder below the one that is searched: its name there, and the table of captions that is in force."""

    name: bytes
    table: int = -1
    stamp: Stamp = (0, 0, 0)


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
            every = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        if not place.name:
            raise
        found.noted.add(place.name, "unreadable folder", f"a folder that cannot be read: {error.strerror}")
        return [], []
    parts = [every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE)]
    files: dict[bytes, Stamp] = {}
    folders: list[bytes] = []
    links: list[bytes] = []
    for stamps, plain, linked, bad in pool.map(_stamps, parts):
        files.update(stamps)
        folders += plain
        links += linked
        for name, kind, reason in bad:
            found.noted.add(prefix + name, kind, reason)
    table, stamp = place.table, place.stamp
    named = [name for name in METADATA if name in files]
    if named:
        table, stamp = len(found.tables), files.pop(named[0])
        found.tables.append(prefix + named[0])
        for name in named[1:]:
            files.pop(name)
            found.noted.add(prefix + name, "caption", f"{named[0].decode()} is read instead")
    _pair(prefix, files, table, stamp, found, max_caption)
    return (
        [_Place(prefix + name, table, stamp) for name in folders],
        [_Place(prefix + name, table, stamp) for name in links],
    )


Bad = tuple[bytes, str, str]


def _stamps(entries: Iterable[os.DirEntry[bytes]]) -> tuple[dict[bytes, Stamp], list[bytes], list[bytes], list[Bad]]:
    """Files -> stamps, folders, linked folders, and what cannot be used. Files of other kinds are not looked at."""
    files: dict[bytes, Stamp] = {}
    folders: list[bytes] = []
    links: list[bytes] = []
    bad: list[Bad] = []
    for entry in entries:
        name = entry.name
        try:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(name)
                continue
            if not _is_wanted(name):
                files[name] = (0, 0, 0)
                continue
            there = entry.stat()
            if stat.S_ISREG(there.st_mode):
                files[name] = there.st_size, there.st_mtime_ns, there.st_ctime_ns
            else:
                bad.append((name, "no file", "not a regular file"))
        except OSError as error:
            looped = error.errno == errno.ELOOP
            reason = "a link that leads to itself" if looped else "a link to nothing"
            bad.append((name, "link", reason if entry.is_symlink() else f"cannot be looked at: {error.strerror}"))
    return files, folders, links, bad


def _is_wanted(name: bytes) -> bool:
    suffix = _suffix(name)
    return suffix in _IMAGES or suffix in SIDECARS or name in METADATA


def _suffix(name: bytes) -> bytes:
    """With its point and in small letters where it is an image's; empty for a name that only begins with one."""
    place = name.rfind(b".")
    if place <= 0:
        return b""
    suffix = name[place:]
    return low if (low := suffix.lower()) in _IMAGES else suffix


_IMAGES = frozenset(f".{suffix}".encode() for suffix in SUFFIXES)


def _pair(
    prefix: bytes, files: dict[bytes, Stamp], table: int, table_stamp: Stamp, found: _Found, max_caption: int
) -> None:
    """Add the images of one folder, each with the caption that comes first."""
    names: list[bytes] = []
    used: dict[bytes, bytes] = {}  # caption file -> its first picture
    shadowed: set[bytes] = set()
    for name, stamp in files.items():
        suffix = _suffix(name)
        if suffix not in _IMAGES:
            continue
        found.images += 1
        stem = name[: -len(suffix)]
        captions = [(kind, stem + end) for end, kind in SIDECARS.items() if stem + end in files]
        if table >= 0:
            captions.append((Kind.METADATA, b""))  # the nearer comes first: a file of the image's own
        if not captions:
            found.noted.add(prefix + name, "no caption", f"no caption file {_shown(stem)}.txt")
            continue
        kind, text = captions[0]
        if len(captions) > 1 and captions[1][0] != Kind.METADATA:  # tables may not name this one
            found.doubled.add(_shown(prefix + name))
        shadowed.update(other for _, other in captions[1:])
        if text in used and text:
            found.twins.add(f"{_shown(prefix + used[text])} and {_shown(name)}")
        elif text:
            used[text] = name
        caption = files[text] if text else table_stamp
        if text and caption[0] > max_caption:
            found.noted.add(
                prefix + name,
                "caption too long",
                f"caption file of {caption[0]} bytes; data.max_caption is {max_caption}",
            )
            continue
        names.append(prefix + name)
        found.stamps.extend((*stamp, *caption))
        found.kinds.append(kind)
        found.table.append(table if kind == Kind.METADATA else -1)
    found.names.append(pa.array(names, pa.binary()))
    _note_the_rest(prefix, files, used, shadowed, found)


def _note_the_rest(
    prefix: bytes, files: dict[bytes, Stamp], used: dict[bytes, bytes], shadowed: set[bytes], found: _Found
) -> None:
    for name in files:
        suffix = _suffix(name)
        if suffix in _IMAGES or name in used:
            continue
        if name in shadowed:
            found.noted.add(prefix + name, "caption", "a caption of the same image in another place comes first")
        elif suffix in SIDECARS:
            found.noted.add(prefix + name, "caption", "a caption without an image of the same name")
        else:
            kind = suffix[1:].lower().decode(errors="backslashreplace")
            found.others[kind] += 1
            found.noted.add(prefix + name, "other", _about(kind))


def _about(kind: str) -> str:
    option = ARCHIVES.get(kind)
    return f"an archive, which {option} reads" if option else "not an image"


def _shown(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


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
