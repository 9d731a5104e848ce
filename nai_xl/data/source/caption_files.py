"""The captions of one image or of many, out of the files that people keep them in."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nai_xl.data.skipped import shown
from nai_xl.errors import one_line

NAMES = ("text", "caption", "captions")  # of a column, or of a key in .json
FILE = "file_name"  # the column that Hugging Face's imagefolder has


class NoCaption(Exception):
    """Why a caption cannot be used. kind: the same in a word or two, for counts."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def decoded(raw: bytes, name: str, encoding: str) -> str:
    """The text of a caption file, without blanks around it. Raises NoCaption."""
    try:
        text = raw.decode(encoding_of(raw, encoding))
    except UnicodeDecodeError as error:
        shown = encoding.upper()
        mend = "; data.encoding=cp1252 reads what Windows has written" if shown == "UTF-8" else ""
        raise NoCaption("undecodable caption", f"caption file {name} is not {shown}{mend}") from error
    if "\0" in text:
        wide = next((e for e, zeros in (("utf-16-le", raw[1::2]), ("utf-16-be", raw[::2])) if _zeros(zeros)), None)
        mend = f"; data.encoding={wide} reads it" if wide else ""
        raise NoCaption("NUL in the caption", f"caption file {name} holds NUL bytes{mend}")
    return one_ending(text).strip()


def one_ending(text: str) -> str:
    """With the lines of Windows and of old Macs ending as all others do."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def encoding_of(raw: bytes, encoding: str) -> str:
    """`encoding`, unless a mark at the beginning says another."""
    if raw.startswith(codecs.BOM_UTF8):  # Windows editors begin with a mark
        return "utf-8-sig"
    return "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else encoding


def _zeros(values: bytes) -> bool:
    return len(values) > 1 and values.count(0) > len(values) * 0.6


def lines_of(text: str) -> list[str]:
    """A caption for each line that is not blank, at least one."""
    return [stripped for line in text.split("\n") if (stripped := line.strip())] or [""]


def of_json(text: str, name: str) -> list[str]:
    """A string, a list of them, or an object with either under one of NAMES. Raises NoCaption."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoCaption("bad .json", f"caption file {name} is not JSON") from error
    if isinstance(found, dict):
        found = next((found[key] for key in NAMES if key in found), None)
    if (captions := listed(found)) is None:
        raise NoCaption("bad .json", f"caption file {name} has no caption: no string, and none under {_or(NAMES)}")
    return captions


def listed(found: Any) -> list[str] | None:
    """The captions of a string or of a list of them, at least one; None for anything else."""
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        return None
    # JSON can say what no text holds
    stripped = [one_ending(text.encode(errors="replace").decode()).strip() for text in found]
    return [text for text in stripped if text] or [""]


def _or(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"


@dataclass
class Tables:
    """metadata.jsonl, .csv and .parquet: captions of many images, read when the first of them asks.

    root: the folder that `files` and images are relative to.
    """

    root: bytes
    files: list[bytes]
    encoding: str
    _read: dict[int, dict[bytes, list[str]] | NoCaption] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def captions(self, number: int, image: bytes) -> list[str]:
        """Those of `image` in table `number`. Raises NoCaption."""
        with self._lock:
            if number not in self._read:
                self._read[number] = self._opened(self.files[number])
        found = self._read[number]
        if isinstance(found, NoCaption):
            raise found
        if image not in found:
            name = os.path.basename(os.fsdecode(self.files[number]))  # noqa: PTH119 - no path
            raise NoCaption("not in the table", f"no caption in {name}: no {FILE} is this file's, or it has no text")
        return found[image]

    def _opened(self, file: bytes) -> dict[bytes, list[str]] | NoCaption:
        path = Path(os.fsdecode(os.path.join(self.root, file)))  # noqa: PTH118 - names are bytes
        name = shown(path.name)
        folder = posixpath.dirname(file)
        try:
            rows = READERS[path.suffix](path, self.encoding)
            return {
                posixpath.normpath(posixpath.join(folder, name.encode(errors="replace"))): captions
                for name, text in rows
                if isinstance(name, str) and (captions := listed(text)) is not None
            }
        except (OSError, ValueError, KeyError, csv.Error, RecursionError, pa.ArrowException) as error:
            return NoCaption("bad table", f"{name} cannot be read: {one_line(error)}")
        except NoCaption as error:  # kept, as the others are: every image of the table asks
            return error


Rows = Iterator[tuple[Any, Any]]


def _jsonl(path: Path, encoding: str) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = _object(decoded(line, path.name, encoding))
            if FILE not in row:
                raise ValueError(f"line {number} is no JSON object with a {FILE}")
            yield row[FILE], next((row[name] for name in NAMES if name in row), None)


def _object(text: str) -> dict[str, Any]:
    """Empty for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _csv(path: Path, encoding: str) -> Rows:
    text = decoded(path.read_bytes(), path.name, encoding)
    rows = csv.DictReader(io.StringIO(text, newline=""))
    column = _column(rows.fieldnames or ())
    return ((row[FILE], row[column]) for row in rows)


def _parquet(path: Path, encoding: str) -> Rows:
    column = _column(pq.read_schema(path).names)
    table = pq.read_table(path, columns=[FILE, column])
    for batch in table.to_batches():
        yield from zip(batch[FILE].to_pylist(), batch[column].to_pylist(), strict=True)


def _column(names: Iterable[str]) -> str:
    there = set(names)
    column = next((name for name in NAMES if name in there), None)
    if FILE not in there or column is None:
        raise ValueError(f"it needs a column {FILE} and one of {_or(NAMES)}")
    return column


READERS: dict[str, Callable[[Path, str], Rows]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
