"""Files of JSON lines that are only appended to. A run directory has two that say all that happened:

metrics.jsonl   a line a report: {"step", "time" in ms, name: value, ...}
outbox.jsonl    a line for everything else, in the order of events: {"time", "kind": "params" | "tags" | "figure" |
                "artifact" | "status" | "nonfinite", ...}. Pictures and files are named by their path.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nai_xl.files import sync, writing
from nai_xl.record.run_dir import RunDirectory

ERROR_LENGTH = 5000  # characters kept of an error's message


class Journal:
    """A file of JSON objects, one a line. Written bytes never change, so a reader can go on from the byte where it
    stopped. A missing file has no rows. A last line without its end and a damaged line are left out.
    """

    def __init__(self, path: Path):
        self.path = path

    def mend(self) -> None:
        """End a last line that a crash has cut short, which would spoil the next one. A writer calls this first."""
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")

    def append(self, **row: Any) -> None:
        """Add a row, and return when it is on the disk. Raises UserError where it cannot be; no part of it stays."""
        line = (json.dumps(row) + "\n").encode()
        with writing(self.path):
            new = not self.path.exists()
            with self.path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    while line:
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise
            if new:
                sync(self.path.parent)

    def after(self, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every whole row that begins at byte `offset` or later, with the byte where it ends. All rows where the file
        is shorter than `offset`, because it was begun anew.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset if offset <= self.path.stat().st_size else 0)
            end = file.tell()
            for line in file:
                end += len(line)
                if (row := _row(line)) is not None:
                    yield end, row

    def rows(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self.after())


def _row(line: bytes) -> dict[str, Any] | None:
    """The object of a whole and undamaged line."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def metrics_of(run_dir: Path) -> Journal:
    return Journal(RunDirectory(run_dir).metrics)


def outbox_of(run_dir: Path) -> Journal:
    return Journal(RunDirectory(run_dir).outbox)


def note_end(run_dir: Path, status: str, error: str = "") -> None:
    """Record how a run ended: FINISHED, FAILED or KILLED. Another process can do it for a run that was killed."""
    outbox_of(run_dir).append(time=now(), kind="status", status=status, error=error[:ERROR_LENGTH])


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)
