"""Images that the rows of a table name: files seen from the table's folder, and addresses."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from nai_xl.data.source import places
from nai_xl.data.source.part import Fault
from nai_xl.errors import one_line

TRIES = 3  # of an address
WEB = ("http", "https")


def seen_from(where: str, at: str) -> str:
    """A name or an address in a row of the table `where`, as this process finds it."""
    at = at.removeprefix("file://")
    if places.is_remote(at) or Path(at).is_absolute():
        return at
    if places.is_remote(where):
        return f"{where.split('?')[0].rpartition('/')[0]}/{at}"
    return str(Path(where).parent / at)


def fetched(where: str, at: str) -> bytes | Fault:
    """The bytes of the file or address `at`, which a row of `where` names, or why there are none."""
    if places.is_remote(at) and _kind(at) not in (*WEB, _kind(where)):
        # fsspec has kinds that run programs or write files
        return Fault("address", f"of kind {_kind(at)}; a table may name https and the kind that it lies at itself")
    reason = ""
    for _ in range(TRIES if places.is_remote(at) else 1):
        try:
            return places.read(at)
        except FileNotFoundError:
            return Fault("missing file", "no such file")
        except OSError as error:
            reason = f"cannot be read: {one_line(error)}"
    return Fault("unreachable image", reason)


def _kind(at: str) -> str:
    return at.partition("://")[0].lower() if places.is_remote(at) else "file"


def mark(where: str, named: Iterable[str]) -> str:
    """40 hex characters that change with any of these files, as far as they lie on this machine."""
    whole = sha256()
    for at in named:
        if not places.is_remote(file := seen_from(where, at)):
            whole.update(f"{file} {_stamp(file)}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()[:40]


def _stamp(file: str) -> str:
    try:
        return places.stamp(file)
    except (OSError, ValueError):  # ValueError: a NUL in a name
        return "none"
