"""Files of JSON lines that are only appended to. A run directory has two that say all that happened:

metrics.jsonl   a line a report: {"step", "time" in ms, name: value, ...}
outbox.jsonl    a line for everything else, in the order of events: {"time", "kind": "params" | "tags" | "figure" |
                "artifact" | "status" | "nonfinite", ...}. Pictures and files are named by their path.

Every line ends with the checksum of its object, written in 32 blanks and tabs: whatever reads JSON passes over them
and finds what was reported, nothing else.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nai_xl.files import sync, writing
from nai_xl.record.run_dir import RunDirectory

Row = dict[str, Any]
CHECKSUM = re.compile(rb"([ \t]{32})\n$")
BITS = bytes.maketrans(b"01", b" \t")
EVENTS = {  # kinds of rows of outbox.jsonl -> what each has beside its time
    "params": {"file"},
    "tags": {"tags"},
    "figure": {"name", "step", "file"},
    "artifact": {"file"},
    "status": {"status", "error"},
    "nonfinite": {"steps", "action"},
}
ERROR_LENGTH = 5000  # characters kept of an error's message


class Journal:
    """A file of JSON objects, one a line. Written bytes never change, so a reader can go on from the byte where it
    stopped. A missing file has no rows.

    Each line ends with a checksum of the rest, in white space; lines of earlier versions have none.
    A damaged line is left out: one whose checksum is wrong, one without below lines that have it, one that `fits` does
    not take, and with `ordered`, one without a checksum whose step does not go up with those of the others.
    """

    def __init__(self, path: Path, fits: Callable[[Row], bool] = bool, *, ordered: bool = False):
        self.path, self.fits, self.ordered = path, fits, ordered

    def mend(self) -> None:
        """End a last line that a crash has cut short, which would spoil the next one, and name damaged lines: they are
        copied to <file>.damaged, and told once. A writer calls this first.
        """
        if not self.path.exists() or not self.path.stat().st_size:
            return
        with self.path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        aside = self.path.with_name(f"{self.path.name}.damaged")
        known = aside.read_bytes() if aside.exists() else b""
        new = [(number, line) for number, line in self._damaged() if line not in known]
        if new:
            with aside.open("ab") as file:
                file.writelines(line for _, line in new)
            numbers = ", ".join(str(number) for number, _ in new[:8]) + (", ..." if len(new) > 8 else "")
            which = f"line {numbers} is" if len(new) == 1 else f"lines {numbers} are"
            print(f"{self.path}: {which} damaged and left out; a copy is in {aside.name}", file=sys.stderr)

    def append(self, **row: Any) -> None:
        """Add a row, and return when it is on the disk. Raises UserError where it cannot be; no part of it stays."""
        line = _checked(json.dumps(row))
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

    def after(self, offset: int = 0) -> Iterator[tuple[int, Row]]:
        """Every whole row that begins at byte `offset` or later, with the byte where it ends. All rows where no row
        ends at `offset`, because the file was begun anew.
        """
        return ((end, row) for end, row, _ in self._read(offset) if row is not None)

    def rows(self) -> Iterator[Row]:
        return (row for _, row in self.after())

    def _damaged(self) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of every damaged line."""
        for number, (_, row, line) in enumerate(self._read(0), start=1):
            if row is None and line.strip():
                yield number, line

    def _read(self, offset: int) -> Iterator[tuple[int, Row | None, bytes]]:
        """Where each line ends, its row if it is sound, and its bytes."""
        if not self.path.exists():
            return iter(())
        lines = self._lines(offset)
        return iter(_in_order([*lines])) if self.ordered else ((end, row, line) for end, row, line, _ in lines)

    def _lines(self, offset: int) -> Iterator[tuple[int, Row | None, bytes, bool]]:
        """As _read, and whether a checksum vouches for the row."""
        any_checked = False
        with self.path.open("rb") as file:
            end = _beginning(file, offset)
            file.seek(end)
            for line in file:
                end += len(line)
                row, checked = _row(line)
                any_checked |= checked
                sound = row is not None and checked == any_checked and self.fits(row)
                yield end, row if sound else None, line, checked


def _beginning(file: BinaryIO, offset: int) -> int:
    """`offset` where a line ends there, or else 0."""
    file.seek(max(offset - 1, 0))
    return offset if offset > 0 and file.read(1) == b"\n" else 0


def _checked(text: str) -> bytes:
    """A line of a JSON object, with the object's CRC-32 in white space, a bit a character."""
    return text.encode() + _in_white_space(text.encode()) + b"\n"


def _in_white_space(text: bytes) -> bytes:
    return f"{zlib.crc32(text):032b}".encode().translate(BITS)


def _row(line: bytes) -> tuple[Row | None, bool]:
    """The object of a whole line, None for a damaged one; and whether it has a checksum."""
    found = CHECKSUM.search(line)
    text = line[: found.start()] if found else line
    if not line.endswith(b"\n") or (found and found[1] != _in_white_space(text)):
        return None, False
    try:
        row = json.loads(text)
    except ValueError:
        return None, False
    return (row, bool(found)) if isinstance(row, dict) else (None, False)


def _in_order(lines: list[tuple[int, Row | None, bytes, bool]]) -> Iterator[tuple[int, Row | None, bytes]]:
    """The lines, without the rows that no checksum vouches for and that are not in the longest rising run of steps."""
    steps = [(place, int(row["step"])) for place, (_, row, _, _) in enumerate(lines) if row is not None]
    tails: list[int] = []  # the last step of the best rising run of each length
    lengths: list[int] = []
    for _, step in steps:
        length = bisect_right(tails, step)
        tails[length : length + 1] = [step]
        lengths.append(length)
    rising: set[int] = set()
    wanted, limit = len(tails) - 1, float("inf")
    for (place, step), length in zip(reversed(steps), reversed(lengths), strict=True):
        if length == wanted and step <= limit:
            rising.add(place)
            wanted, limit = wanted - 1, step
    for place, (end, row, line, checked) in enumerate(lines):
        yield end, row if checked or place in rising else None, line


def _is_report(row: Row) -> bool:
    return isinstance(row.get("step"), int) and isinstance(row.get("time", 0), int | float)


def _is_event(row: Row) -> bool:
    kind = row.get("kind")
    return isinstance(kind, str) and kind in EVENTS and {"time", *EVENTS[kind]} <= row.keys()


def metrics_of(run_dir: Path) -> Journal:
    return Journal(RunDirectory(run_dir).metrics, _is_report, ordered=True)


def outbox_of(run_dir: Path) -> Journal:
    return Journal(RunDirectory(run_dir).outbox, _is_event)


def note_end(run_dir: Path, status: str, error: str = "") -> None:
    """Record how a run ended: FINISHED, FAILED or KILLED. Another process can do it for a run that was killed."""
    outbox_of(run_dir).append(time=now(), kind="status", status=status, error=error[:ERROR_LENGTH])


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)
