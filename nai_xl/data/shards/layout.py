"""How the entries of one kind lie in a shard: each is a row of so many bytes, whose pieces are the entry's tensors."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nai_xl.data.tensor_file import DTYPES, LENGTH, NAMES

PAGE = 4096
MOST = 10**12  # rows, whose number of digits the header has room for


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of an entry, at `start` bytes from the beginning of its row."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.start + self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The pieces of a row, wide types first, so that each is aligned; `stride` is the row's length in bytes."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Raises KeyError for a dtype that a safetensors file cannot hold."""
        names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        return _laid_out(tuple((name, NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names))

    @classmethod
    def read(cls, line: bytes) -> Layout | None:
        """What `line` of a layout says; None if it is damaged."""
        return _read(line)

    @property
    def stride(self) -> int:
        return self.pieces[-1].end if self.pieces else 0

    @cached_property
    def line(self) -> bytes:
        """The layout as one line of JSON with a checksum of its own."""
        told = json.dumps([(p.name, NAMES[p.dtype], p.shape) for p in self.pieces], separators=(",", ":"))
        return f"{zlib.crc32(told.encode()):08x} {told}\n".encode()

    @property
    def kind(self) -> str:
        """'latents-bf16-4x128x128', for the names of files."""
        first = max(self.pieces, key=lambda piece: piece.end - piece.start, default=None)
        if first is None:
            return "empty"
        names = "+".join(piece.name for piece in self.pieces)
        words = f"{names}-{NAMES[first.dtype].lower()}-{'x'.join(map(str, first.shape))}"
        return "".join(c if c.isascii() and (c.isalnum() or c in "+-") else "_" for c in words)[:80]

    @cached_property
    def base(self) -> int:
        """Bytes before the first row: a safetensors header, with room for any number of rows."""
        return -(-(LENGTH + len(self._described(MOST))) // PAGE) * PAGE

    def header(self, rows: int) -> bytes:
        """The beginning of a safetensors file of so many rows, `base` bytes.

        An entry of one tensor is a row of one tensor of its name, [rows, ...]. Several tensors lie side by side in
        `rows` [rows, length], whose type is theirs, or bytes if they have several; the metadata tell what is where.
        """
        return (self.base - LENGTH).to_bytes(LENGTH, "little") + self._described(rows).ljust(self.base - LENGTH)

    def _described(self, rows: int) -> bytes:
        kinds = {piece.dtype for piece in self.pieces}
        dtype = kinds.pop() if len(kinds) == 1 else torch.uint8
        name, shape = "rows", [rows, self.stride // dtype.itemsize]
        if len(self.pieces) == 1:
            name, shape = self.pieces[0].name, [rows, *self.pieces[0].shape]
        pieces = [(p.name, NAMES[p.dtype], p.shape, p.start) for p in self.pieces]
        tensor = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [0, rows * self.stride]}
        metadata = {"format": "pt", "pieces": json.dumps(pieces)}  # name, dtype, shape, first byte in a row
        return json.dumps({"__metadata__": metadata, name: tensor}, separators=(",", ":")).encode()

    def pack(self, tensors: Mapping[str, Tensor]) -> NDArray[np.uint8]:
        """One row, [stride]."""
        row = np.empty(self.stride, np.uint8)
        for piece in self.pieces:
            if piece.count:
                flat = tensors[piece.name].detach().contiguous().reshape(-1)
                row[piece.start : piece.end] = flat.view(torch.uint8).numpy()
        return row

    def unpack(self, row: NDArray[np.uint8]) -> dict[str, Tensor]:
        """The tensors of a row; they share its memory."""
        return {piece.name: _tensor(row, piece) for piece in self.pieces}


def _tensor(row: NDArray[np.uint8], piece: Piece) -> Tensor:
    if not piece.count:  # frombuffer refuses an empty range
        return torch.empty(piece.shape, dtype=piece.dtype)
    return torch.frombuffer(row, dtype=piece.dtype, count=piece.count, offset=piece.start).view(piece.shape)


@lru_cache(maxsize=1024)  # an entry is one of a few kinds, and this is asked for each
def _laid_out(described: tuple[tuple[str, str, tuple[int, ...]], ...]) -> Layout:
    pieces: list[Piece] = []
    for name, dtype, shape in described:
        pieces.append(Piece(name, DTYPES[dtype], shape, pieces[-1].end if pieces else 0))
    return Layout(tuple(pieces))


@lru_cache(maxsize=1024)
def _read(line: bytes) -> Layout | None:
    told, _, words = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or told != b"%08x" % zlib.crc32(words):
        return None
    try:
        described: Any = json.loads(words)
        return _laid_out(tuple((str(name), str(dtype), tuple(map(int, shape))) for name, dtype, shape in described))
    except (ValueError, TypeError, KeyError):
        return None
