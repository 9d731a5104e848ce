"""A table in the user's cache directory of what an earlier scan read, for files that have not changed since.

A file counts as unchanged while its length and both its times are the same. One that changed within the coarsest
step of a file system's clock before it was read is not remembered: it could change again and show the same times
("racy git", https://git-scm.com/docs/racy-git).
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nai_xl.data.cache import content_key
from nai_xl.files import user_cache, write_atomically

VERSION = 1  # raise it whenever rows or what a scan reads of a file change
CLOCK = 2.0  # seconds: the step of FAT's times, the coarsest in use


def stamp(file: str) -> tuple[str, int]:
    """A line that changes with a file's content, and the later of its times in ns since the epoch. Raises OSError."""
    found = os.stat(file)  # noqa: PTH116 - a Path costs twice as much
    # the inode's time too: unpacked archives and copies that keep times give many files the same modification time
    modified, changed = found.st_mtime_ns, found.st_ctime_ns
    return f"{found.st_size} {modified} {changed}\n", max(modified, changed)


@dataclass
class ScanCache:
    """File -> its stamp, followed by what was read of it: `rows` of earlier scans, `current` of this one.

    A row is one string: a million small lists would keep Python's garbage collection busier than the scan itself.

    Best effort: a missing or damaged table counts as empty, and errors of writing are ignored. Processes that scan at
    once each write the whole table with the same rows; the last one stays.
    """

    folder: str
    table: Path
    rows: dict[str, str] = field(default_factory=dict)
    current: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> ScanCache:
        """What earlier scans saw of the files below `folder`."""
        table = user_cache() / "index" / f"{content_key(VERSION, folder.resolve())}.json"
        rows: dict[str, str] = {}
        with suppress(OSError):
            check, _, body = table.read_bytes().partition(b"\n")
            if check == b"%08x" % zlib.crc32(body):
                rows = json.loads(body)
        return cls(str(folder), table, rows)

    def facts(self, file: str, read: Callable[[str], str]) -> str:
        """What `read(file)` returns, without calling it for a file that is unchanged. Raises OSError, and whatever
        `read` raises.
        """
        now = time.time()
        mark, changed = stamp(file)
        name = file[len(self.folder) :]
        row = self.rows.get(name)
        if row is None or not row.startswith(mark):
            row = mark + read(file)
        if changed < (now - CLOCK) * 1e9:
            self.current[name] = row
        return row[len(mark) :]

    def save(self) -> None:
        """Write what this scan saw; files that are gone are forgotten."""
        if self.current == self.rows:
            return
        body = json.dumps(self.current, separators=(",", ":")).encode()
        with suppress(OSError):
            write_atomically(self.table, lambda path: path.write_bytes(b"%08x\n" % zlib.crc32(body) + body))
