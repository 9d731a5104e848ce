"""Files on this machine or behind an address that fsspec knows (s3://, gs://, https://): found, dated, read in part."""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from nai_xl.errors import UserError, one_line
from nai_xl.redact import redacted

MOST = 1_000_000  # files that one pattern of braces may stand for
AT_ONCE = 32  # requests that wait for a distant store together
AHEAD = 8 << 20  # bytes of a remote file that are read at a time, one after another
BRACES = re.compile(r"(?<!\$)\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
# what changes with a remote file's content, the surest first; backends name it differently
VERSIONS = "ETag etag md5Hash md5 generation LastModified last_modified mtime updated created".split()
# errors of backends that are no OSError: looked up where the package is loaded already
FOREIGN = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)


def failures(*further: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading a file can raise, wherever it lies."""
    foreign = (getattr(sys.modules.get(module), name, None) for module, name in FOREIGN)
    return (OSError, ValueError, ImportError, pa.ArrowException, *(kind for kind in foreign if kind), *further)


def is_remote(where: str) -> bool:
    return "://" in where


def shown(where: str) -> str:
    """The name of a file without secrets, and without what a signed address has after its path."""
    return redacted(where).split("?")[0] if is_remote(where) else where


def name(where: str) -> str:
    """What a file is called in messages and in Item.path, whose slashes a "//" would not survive."""
    return shown(where).partition("://")[2] if is_remote(where) else where


def find(key: str, given: str | Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Every file that the setting `key` names, sorted: files, folders, patterns with {000..123}, {a,b}, * and ?.

    suffixes: of the files that are taken from a folder, such as ".tar". Raises UserError for a name without files.
    """
    found: dict[str, None] = {}
    for named in [given] if isinstance(given, str) else given:
        whole = named.removeprefix("file://")
        for one in [whole] if _is_there(whole) else _without_braces(key, whole):
            with told(key, one):
                files = _remote_files(one, suffixes) if is_remote(one) else _local_files(Path(one), suffixes)
            if not files:
                raise UserError(f"{key}={shown(one)}: no such file, nor a folder with any of {', '.join(suffixes)}")
            found |= dict.fromkeys(files)
    if not found:
        raise UserError(f"{key} names no file; set {key}=FILE")
    return sorted(found)


def _is_there(where: str) -> bool:
    return not is_remote(where) and Path(where).expanduser().exists()


@contextmanager
def told(key: str, where: str) -> Iterator[None]:
    """Inside the block, an error of reading `where` becomes a UserError that names the setting `key`."""
    try:
        yield
    except failures() as error:
        raise UserError(f"{key}={shown(where)}: {one_line(error)}") from error


def _without_braces(key: str, pattern: str) -> Iterator[str]:
    parts = BRACES.split(pattern)  # text, inside, text, inside, text
    choices = [[part] if place % 2 == 0 else _choices(part) for place, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
        if count > MOST:
            raise UserError(f"{key}={shown(pattern)}: names more than {MOST} files; set a narrower pattern")
    return map("".join, itertools.product(*choices))


def _choices(inside: str) -> Sequence[str]:
    """'000..123' -> '000', '001', ...; 'a,b' -> 'a', 'b'."""
    if numbers := RANGE.fullmatch(inside):
        first, last = numbers.groups()
        wide = len(first) if first.startswith("0") else 0
        return _Numbers(int(first), int(last), wide)
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


@dataclass(frozen=True)
class _Numbers(Sequence[str]):
    first: int
    last: int
    wide: int

    def __len__(self) -> int:
        return max(0, self.last - self.first + 1)

    def __getitem__(self, place: Any) -> Any:
        return f"{range(self.first, self.last + 1)[place]:0{self.wide}d}"


def _local_files(path: Path, suffixes: Sequence[str]) -> list[str]:
    path = path.expanduser()
    if path.is_dir():
        return [str(file) for file in path.rglob("*") if file.name.lower().endswith(tuple(suffixes)) and file.is_file()]
    if path.exists():
        return [str(path)]
    system = fsspec.filesystem("file")
    return [file for file in map(str, system.glob(str(path))) if Path(file).is_file()] if _is_glob(str(path)) else []


def _is_glob(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _remote_files(address: str, suffixes: Sequence[str]) -> list[str]:
    system, path = fsspec.core.url_to_fs(address)
    if _is_glob(path) and "?" not in address:
        return [system.unstrip_protocol(file) for file in system.glob(path)]
    if address.lower().split("?")[0].endswith(tuple(suffixes)):
        return [address]  # asked for by name: what is wrong with it is told when it is read
    if system.isdir(path):
        found = [str(file) for file in system.find(path)]
        return [system.unstrip_protocol(file) for file in found if file.lower().endswith(tuple(suffixes))]
    return [address] if system.exists(path) else []


def stamps(key: str, files: Sequence[str]) -> list[str]:
    """A line for each file that changes with its content. Raises UserError for one that cannot be reached.

    Of a remote file its length and what its store says of its version. Some servers say nothing but the length.
    """

    def one(where: str) -> str:
        with told(key, where):
            return stamp(where)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, files))


def stamp(where: str) -> str:
    """Raises one of failures()."""
    if not is_remote(where):
        found = Path(where).stat()
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    system, path = fsspec.core.url_to_fs(where)
    known = system.info(path)
    version = next((str(known[key]) for key in VERSIONS if known.get(key)), "")
    return f"{known.get('size')} {version}"


def size(where: str) -> int:
    """Bytes of a file. Raises one of `failures()`."""
    if not is_remote(where):
        return Path(where).stat().st_size
    system, path = fsspec.core.url_to_fs(where)
    return int(system.size(path))


def opened(where: str) -> BinaryIO:
    """A file to be read from its beginning to its end, with leaps. Raises one of `failures()`."""
    if not is_remote(where):
        return Path(where).open("rb")
    system, path = fsspec.core.url_to_fs(where)
    return cast(BinaryIO, system.open(path, "rb", block_size=AHEAD, cache_type="readahead"))


def read(where: str, offset: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `offset` on, by one request; or all. Raises OSError, also where there are fewer."""
    try:
        found = _read(where, offset, length)
    except FileNotFoundError:
        raise
    except failures() as error:
        raise OSError(f"{shown(where)}: {one_line(error)}") from error
    if length is not None and len(found) != length:
        raise OSError(f"{shown(where)} has {len(found)} of the {length} bytes at {offset} that it had before")
    return found


def _read(where: str, offset: int, length: int | None) -> bytes:
    if is_remote(where):
        system, path = fsspec.core.url_to_fs(where)
        end = None if length is None else offset + length
        return bytes(system.cat_file(path, start=offset or None, end=end))
    with Path(where).open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read() if length is None else file.read(length)


@dataclass(frozen=True)
class Ranges:
    """A Store of images that lie inside larger files: columns `shard`, the number of the file, `offset` and `length`.

    An image that lies elsewhere has its place in a column `at`.
    """

    files: tuple[str, ...]

    def open(self, row: dict[str, Any]) -> BinaryIO:
        if row.get("at"):
            return io.BytesIO(read(os.fsdecode(row["at"])))
        return io.BytesIO(read(self.files[row["shard"]], row["offset"], row["length"]))
