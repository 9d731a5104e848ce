"""Safetensors files, written without a copy of their tensors and with a checksum.

The format: 8 bytes with the length of the header, little-endian; the header, JSON; the tensors' bytes without gaps.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
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
PORTION = 1 << 24  # bytes that are written or summed up at a time


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Write tensors that lie on the CPU, without a copy of them. Returns the file's bytes and their CRC-32.

    Raises OSError; KeyError for a dtype that has no name here.
    """
    header, ordered = _described(tensors)
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


def _described(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, memoryview]]:
    """The header, and each tensor's bytes in the order of the file.

    Wide types come first and the header's length is a multiple of 8, so that every tensor is aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ordered = {name: _bytes(tensors[name]) for name in names}
    entries = ",".join(_entries(tensors, ordered))
    header = b"{" + entries.encode() + b"}"
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
