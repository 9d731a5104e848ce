"""What lies in a tar file and where: names, offsets and lengths of its members. Nothing is ever unpacked.

POSIX.1-2017 pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format" (long names,
base-256 numbers, sparse files). Names are bytes as they stand there: nobody opens a file of that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

BLOCK = 512
LONGEST = 1 << 20  # bytes of a header's extension: a name has some hundred
FILE, OLD_FILE, CONTIGUOUS = b"0", b"\0", b"7"
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL, SPARSE = b"L", b"K", b"x", b"g", b"S"
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
FOLDER = "a folder"
BARE = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": FOLDER, b"6": "a pipe"}


class Damaged(ValueError):
    """From here on, the file is no tar file."""


@dataclass(frozen=True, slots=True)
class Member:
    """`length` bytes from `offset` on. wrong: why they are not the content of a file of this name."""

    name: bytes
    offset: int
    length: int
    wrong: str = ""


@dataclass
class _Extended:
    """What the headers before a member's own say of it."""

    name: bytes | None = None
    size: int | None = None
    sparse: bool = False
    common: dict[bytes, bytes] = field(default_factory=dict)  # of all that follow

    def take(self, records: dict[bytes, bytes]) -> None:
        records = {**self.common, **records}
        self.sparse = any(key.startswith(b"GNU.sparse.") for key in records)
        self.name = records.get(b"GNU.sparse.name", records.get(b"path", self.name))
        if b"size" in records:
            self.size = _decimal(records[b"size"])


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """The members of a tar file of `size` bytes, in its order, those after a premature end mark too.

    Raises Damaged where a header is none, or is cut off; what came before it is sound. Raises OSError.
    """
    at, said, ended = 0, _Extended(), False
    while at + BLOCK <= size:
        header = _read(file, at, BLOCK)
        ended = not any(header)
        if ended:  # an end mark; archives that were strung together go on after it
            at += BLOCK
            continue
        kind, length, content = header[156:157], _number(_checked(header, at)[124:136]), at + BLOCK
        if kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL):
            _extend(said, kind, _extension(file, content, length, size))
            at = content + _padded(length)
            continue
        if kind == SPARSE:
            content = _after_map(file, header, content)
        length = 0 if kind in BARE else length if said.size is None else said.size
        if kind not in BARE and content + length > size:
            yield Member(said.name or _name(header), content, size - content, "cut off at the end of the tar file")
            return
        yield Member(said.name or _name(header), content, length, _wrong(kind, header, said))
        at, said = content + _padded(length), _Extended(common=said.common)
    if at < size:
        raise Damaged(f"{size - at} bytes at its end are no part of a tar file")
    if not ended:
        raise Damaged("it has no end mark, as if it were cut off")


def _wrong(kind: bytes, header: bytes, said: _Extended) -> str:
    if kind == OLD_FILE and _name(header).endswith(b"/"):
        return FOLDER
    if kind == SPARSE or said.sparse:
        return "a sparse file, which tar keeps in pieces"
    if kind in (FILE, OLD_FILE, CONTIGUOUS):
        return ""
    return BARE.get(kind, f"of an unknown kind, {kind!r}")


def _read(file: BinaryIO, at: int, length: int) -> bytes:
    file.seek(at)
    found = file.read(length)
    if len(found) < length:
        raise Damaged(f"it ends at byte {at + len(found)}, in the middle of a header")
    return found


def _checked(header: bytes, at: int) -> bytes:
    """The header, whose checksum is right: of unsigned bytes, or of signed ones as some old programs have it."""
    blank = header[:148] + b" " * 8 + header[156:]
    sums = sum(blank), sum(byte - 256 if byte > 127 else byte for byte in blank)
    try:
        right = _number(header[148:156]) in sums
    except Damaged:
        right = False
    if at == 0 and header.startswith(COMPRESSED):
        raise Damaged("it is compressed, and there is no way to one image of it; unpack it to a .tar")
    if not right:
        raise Damaged(f"no header at byte {at}")
    return header


def _number(digits: bytes) -> int:
    """Octal digits, or, where the first bit is set, a number of base 256."""
    if digits[0] & 0x80:
        if digits[0] & 0x40:
            raise Damaged("a header has a negative length")
        return int.from_bytes(bytes([digits[0] & 0x3F]) + digits[1:], "big")
    words = digits.replace(b"\0", b" ").split() or [b"0"]
    if not re.fullmatch(rb"[0-7]+", words[0]):
        raise Damaged(f"a header has {words[0][:12]!r} for a number")
    return int(words[0], 8)


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise Damaged(f"a header has {digits[:12]!r} for a length")
    return int(digits)


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _extension(file: BinaryIO, at: int, length: int, size: int) -> bytes:
    if length > LONGEST or at + length > size:
        raise Damaged(f"a header of {length} bytes at byte {at}")
    return _read(file, at, length)


def _extend(said: _Extended, kind: bytes, content: bytes) -> None:
    if kind == LONG_NAME:
        said.name = content.rstrip(b"\0")
    elif kind == PAX:
        said.take(_records(content))
    elif kind == PAX_GLOBAL:
        said.common |= _records(content)
        said.take({})


def _records(content: bytes) -> dict[bytes, bytes]:
    """The lines "LENGTH KEY=VALUE\\n" of a pax header: key -> value."""
    found, at = {}, 0
    while at < len(content):
        digits = content[at : at + 20].split(b" ")[0]
        line = content[at : at + _decimal(digits)]
        key, equals, value = line[len(digits) + 1 :].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise Damaged("a pax header is no list of keys and values")
        found[key] = value[:-1]
        at += len(line)
    return found


def _after_map(file: BinaryIO, header: bytes, at: int) -> int:
    """Where the content of a sparse file of GNU's old kind begins: after further blocks of its map."""
    more = header[482]
    while more:
        more = _read(file, at, BLOCK)[504]
        at += BLOCK
    return at


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
