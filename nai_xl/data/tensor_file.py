"""Reading small safetensors files in one read. Mapping them, as the library does, costs more than their content.

The format: 8 bytes with the length of the header, little-endian; the header, JSON; the tensors' bytes without gaps.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache
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
    """All tensors of a safetensors file, which share one buffer; None if it is truncated or damaged.

    Raises OSError when the file is missing or cannot be read.
    """
    with open(file, "rb", buffering=0) as stream:  # noqa: PTH123 - a Path costs as much as the reading
        data = np.empty(os.fstat(stream.fileno()).st_size, np.uint8)  # a bytearray would be zeroed first
        if stream.readinto(data.data) != len(data):
            return None
    begin = LENGTH + int.from_bytes(data[:LENGTH].tobytes(), "little")
    layout = _layout(data[LENGTH:begin].tobytes())
    if layout is None or begin + layout.size != len(data):
        return None
    return {entry.name: _tensor(data, begin, entry) for entry in layout.entries}


def is_whole(file: str) -> bool:
    """Whether `read_tensors` would give tensors, from the header and the file's length alone. Raises OSError alike."""
    with open(file, "rb", buffering=0) as stream:  # noqa: PTH123 - a Path costs as much as the reading
        size = os.fstat(stream.fileno()).st_size
        begin = LENGTH + int.from_bytes(stream.read(LENGTH), "little")
        layout = _layout(stream.read(begin - LENGTH)) if begin <= size else None
    return layout is not None and begin + layout.size == size


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
