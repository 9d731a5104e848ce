"""One shard: a safetensors file of rows that grows while it is written, and beside it the keys of its rows.

    NAME.open            while a process appends to it; whoever holds the lock of its keys
    NAME.safetensors     at any other time, which every reader of safetensors files can open
    NAME.keys            one line with the layout, then a record for each row: key and checksum
    NAME.dead            numbers of rows that turned out damaged, or that were put anew

A row is written before its record, and nothing is ever written over, so that a killed writer leaves whole entries and
at most one row without a record. Nothing waits for the disk: after a power cut, the checksums tell.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nai_xl.data.shards.layout import Layout

FULL = 256_000_000  # bytes of a shard's rows, after which the next one begins
KEY = 16  # bytes
RECORD = np.dtype([("hi", ">u8"), ("lo", ">u8"), ("crc", "<u4")])  # hi and lo: the two halves of the key
SEALED, OPEN, KEYS, DEAD = ".safetensors", ".open", ".keys", ".dead"
LONGEST = 1 << 20  # bytes of a layout's line
MODE = 0o666  # less the umask


class File:
    """A file that is closed when nobody holds it any more, and its lock with it."""

    def __init__(self, path: Path | str, flags: int):
        self.number = -1
        self.number = os.open(path, flags, MODE)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.number >= 0:
            close(self.number)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of it. Raises OSError."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self.number, rest, offset)
            rest, offset = rest[written:], offset + written

    @property
    def size(self) -> int:
        return os.fstat(self.number).st_size


def crc_of(key: bytes, row: NDArray[np.uint8]) -> int:
    """The checksum of an entry. It covers the key, so that a row is not taken for another one."""
    return zlib.crc32(row.data, zlib.crc32(key))


def records_in(size: int, line: bytes) -> int:
    """Whole records of a file of keys with `size` bytes that begins with `line`."""
    return max(0, size - len(line)) // RECORD.itemsize


def read_line(keys: Path) -> bytes:
    """The first line of a file of keys; empty if it has none. Raises OSError."""
    with keys.open("rb") as file:
        line = file.readline(LONGEST)
    return line if line.endswith(b"\n") else b""


def read_records(keys: Path, line: bytes, start: int, stop: int) -> NDArray[np.void]:
    """Records `start` to `stop` of a file of keys that begins with `line`. Raises OSError."""
    return np.fromfile(keys, RECORD, count=stop - start, offset=len(line) + start * RECORD.itemsize)


def bury(folder: Path, stem: str, rows: NDArray[np.uint32]) -> None:
    """Note rows that are not to be read again. Raises OSError."""
    file = File(folder / f"{stem}{DEAD}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file.number, rows.astype("<u4").tobytes())


@dataclass
class Writer:
    """Appends to a shard, of which it is the only writer. `rows`: how many there are."""

    folder: Path
    stem: str
    layout: Layout
    keys: File
    data: File
    rows: int = 0

    @classmethod
    def new(cls, folder: Path, layout: Layout) -> Writer:
        """Raises OSError."""
        stem = f"{layout.kind}-{secrets.token_hex(6)}"
        paths = folder / f"{stem}{KEYS}", folder / f"{stem}{OPEN}"
        try:
            keys = File(paths[0], os.O_RDWR | os.O_CREAT | os.O_EXCL)
            fcntl.flock(keys.number, fcntl.LOCK_EX)
            data = File(paths[1], os.O_RDWR | os.O_CREAT | os.O_EXCL)
            keys.write(layout.line, 0)
            data.write(layout.header(0), 0)
        except OSError:
            for path in paths:
                path.unlink(missing_ok=True)
            raise
        return cls(folder, stem, layout, keys, data)

    @classmethod
    def resume(cls, folder: Path, stem: str) -> Writer | None:
        """Go on with a shard; None while another process does, or if a part of it is gone or damaged. Raises OSError.

        Rows that its file is too short for are buried, so that new ones get numbers of their own.
        """
        try:
            keys = File(folder / f"{stem}{KEYS}", os.O_RDWR)
            fcntl.flock(keys.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            line = read_line(folder / f"{stem}{KEYS}")
            if (layout := Layout.read(line)) is None:
                return None
            with suppress(FileNotFoundError):  # left open by a process that was killed
                (folder / f"{stem}{SEALED}").rename(folder / f"{stem}{OPEN}")
            data = File(folder / f"{stem}{OPEN}", os.O_RDWR)
        except (BlockingIOError, FileNotFoundError):
            return None
        rows = records_in(keys.size, line)
        whole = whole_rows(data.size, layout, rows)
        if whole < rows:
            bury(folder, stem, np.arange(whole, rows, dtype=np.uint32))
        return cls(folder, stem, layout, keys, data, rows)

    @property
    def full(self) -> bool:
        return self.rows * self.layout.stride >= FULL

    def append(self, key: bytes, row: NDArray[np.uint8]) -> None:
        """Raises OSError; the shard is then as it was."""
        self.data.write(row.data, self.layout.base + self.rows * self.layout.stride)
        record = key + crc_of(key, row).to_bytes(4, "little")
        self.keys.write(record, len(self.layout.line) + self.rows * RECORD.itemsize)
        self.rows += 1

    def seal(self) -> None:
        """Write into its header how many rows there are, and let others go on with it. Raises OSError."""
        self.data.write(self.layout.header(self.rows), 0)
        os.ftruncate(self.data.number, self.layout.base + self.rows * self.layout.stride)
        (self.folder / f"{self.stem}{OPEN}").rename(self.folder / f"{self.stem}{SEALED}")


def whole_rows(size: int, layout: Layout, rows: int) -> int:
    """How many of `rows` a file of `size` bytes has in full."""
    if not layout.stride:
        return rows if size >= layout.base else 0
    return min(rows, max(0, size - layout.base) // layout.stride)


def adopt(folder: Path) -> None:
    """Seal the shards that dead processes have left open. Raises OSError."""
    for path in folder.glob(f"*{OPEN}"):
        stem = path.name.removesuffix(OPEN)
        try:
            writer = Writer.resume(folder, stem)
        except (FileNotFoundError, PermissionError):  # without keys, or another user's
            continue
        if writer is not None:
            writer.seal()
