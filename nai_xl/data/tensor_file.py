"""Safetensors files, read in one read and written with a checksum.

Mapping a small file, as the library does, costs more than its content. Writing with the library takes a copy of every
tensor, and tells no checksum.

The format: 8 bytes with the length of the header, little-endian; the header, JSON; the tensors' bytes without gaps.
https://github.com/huggingface/safetensors#format

The files of a cache carry a CRC-32 of their own, as metadata at the beginning of the header. It covers the rest of the
header and all tensors. Files without it are read as they are.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LENGTH = 8  # bytes before the header
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHECKED = b'{"__metadata__":{"crc32":"'  # how a header with a checksum begins; 8 hexadecimal digits follow
DIGITS = 8
PORTION = 1 << 24  # bytes that are written or summed up at a time


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor: `start` counts bytes from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    count: int
    start: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a header says: its tensors, and how many bytes follow it."""

    entries: tuple[_Entry, ...]
    size: int


def read_tensors(file: str) -> dict[str, Tensor] | None:
    """All tensors of a safetensors file, which share one buffer; None if it is truncated, damaged or not what its
    checksum says.

    Raises OSError when the file is missing or cannot be read.
    """
    with open(file, "rb", buffering=0) as stream:  # noqa: PTH123 - a Path costs as much as the reading
        data = np.empty(os.fstat(stream.fileno()).st_size, np.uint8)  # a bytearray would be zeroed first
        if stream.readinto(data.data) != len(data):
            return None
    begin = LENGTH + int.from_bytes(data[:LENGTH].tobytes(), "little")
    header, told = _without_sum(data[LENGTH:begin].tobytes())
    layout = _layout(header)
    if layout is None or begin + layout.size != len(data):
        return None
    if told is not None and told != b"%08x" % zlib.crc32(data[begin:].data, zlib.crc32(header)):
        return None
    return {entry.name: _tensor(data, begin, entry) for entry in layout.entries}


def is_whole(file: str) -> bool:
    """Whether the header and the file's length are those of a whole file; the tensors are not read. Raises OSError as
    `read_tensors` does.
    """
    with open(file, "rb", buffering=0) as stream:  # noqa: PTH123 - a Path costs as much as the reading
        size = os.fstat(stream.fileno()).st_size
        begin = LENGTH + int.from_bytes(stream.read(LENGTH), "little")
        layout = _layout(_without_sum(stream.read(begin - LENGTH))[0]) if begin <= size else None
    return layout is not None and begin + layout.size == size


def write_checked(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a small file with a checksum in its header. Raises OSError; KeyError for a dtype that has no name here."""
    header, ordered = _described(tensors, CHECKED + b"0" * DIGITS + b'"},')
    rest, _ = _without_sum(header)
    body = b"".join(ordered.values())
    told = b"%08x" % zlib.crc32(body, zlib.crc32(rest))
    whole = CHECKED + told + rest[len(CHECKED) :]
    path.write_bytes(len(whole).to_bytes(LENGTH, "little") + whole + body)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Write tensors that lie on the CPU, without a copy of them. Returns the file's bytes and their CRC-32.

    Raises OSError; KeyError for a dtype that has no name here.
    """
    header, ordered = _described(tensors, b"{")
    begin = len(header).to_bytes(LENGTH, "little") + header
    size, crc = len(begin), zlib.crc32(begin)
    with path.open("wb") as file:
        file.write(begin)
        for data in ordered.values():
            for start in range(0, len(data), PORTION):
                portion = data[start : start + PORTION]
                file.write(portion)
                crc = zlib.crc32(portion, crc)
            size += len(data)
    return size, crc


def measured(path: Path) -> tuple[int, int]:
    """A file's bytes and their CRC-32. Raises OSError."""
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(PORTION, path.stat().st_size + 1)))
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
            size += count
    return size, crc


def _described(tensors: Mapping[str, Tensor], opening: bytes) -> tuple[bytes, dict[str, memoryview]]:
    """The header, which begins with `opening`, and each tensor's bytes in the order of the file.

    Wide types come first and the header's length is a multiple of 8, so that every tensor is aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ordered = {name: _bytes(tensors[name]) for name in names}
    entries = ",".join(_entries(tensors, ordered))
    header = opening.removesuffix(b"," if not entries else b"") + entries.encode() + b"}"
    return header + b" " * (-len(header) % LENGTH), ordered


def _entries(tensors: Mapping[str, Tensor], ordered: Mapping[str, memoryview]) -> Iterator[str]:
    start = 0
    for name, data in ordered.items():
        told = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": [*tensors[name].shape],
            "data_offsets": [start, start + len(data)],
        }
        yield f"{json.dumps(name)}:{json.dumps(told, separators=(',', ':'))}"
        start += len(data)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _without_sum(header: bytes) -> tuple[bytes, bytes | None]:
    """The header without the digits of its checksum, and those; None where it has none.

    Files of one kind and shape share the first.
    """
    if not header.startswith(CHECKED):
        return header, None
    end = len(CHECKED) + DIGITS
    return CHECKED + header[end:], header[len(CHECKED) : end]


def _tensor(data: NDArray[np.uint8], begin: int, entry: _Entry) -> Tensor:
    if not entry.count:  # frombuffer refuses an empty range
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(data, dtype=entry.dtype, count=entry.count, offset=begin + entry.start).view(entry.shape)


@lru_cache(maxsize=4096)  # files of one kind and shape have the same header, and parsing it costs as much as the rest
def _layout(header: bytes) -> _Layout | None:
    """What the header describes, or None for what is not one or leaves bytes without owner."""
    try:
        described: dict[str, Any] = json.loads(header.decode())
        described.pop("__metadata__", None)
        entries = [_entry(name, **tensor) for name, tensor in described.items()]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    size = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.count)):
        if entry.start != size:
            return None
        size += entry.count * entry.dtype.itemsize
    return _Layout(tuple(entries), size)


def _entry(name: str, *, dtype: str, shape: list[int], data_offsets: list[int], **_: object) -> _Entry:
    """Raises KeyError, TypeError or ValueError for what the format does not allow."""
    start, stop = data_offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("not a count")
    kind, count = DTYPES[dtype], math.prod(shape)
    if count * kind.itemsize != stop - start:
        raise ValueError("as many bytes as elements")
    return _Entry(name, kind, tuple(shape), count, start)
