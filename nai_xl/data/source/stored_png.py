"""PNG files whose bytes are the same on every machine.

Deflate leaves the compressor free: two versions of zlib write other bytes for the same picture, and its content hash
would change with them. So nothing is compressed: stored blocks, RFC 1951 section 3.2.4, of four bits a pixel.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

COLOURS = 16  # of a palette of four bits
BLOCK = 65535  # bytes that a stored block can hold


def stored_png(places: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """The PNG file of `places` [H, W], W even, which are rows of `palette` [16, 3]; PNG specification, 2nd edition."""
    height, width = places.shape
    packed = places[:, 0::2] << 4 | places[:, 1::2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), packed], axis=1).tobytes()  # filter type 0 begins each row
    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)  # 4 bits, palette, not interlaced
    chunks = [(b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", _stored(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _stored(data: bytes) -> bytes:
    """A zlib stream (RFC 1950) of stored blocks."""
    starts = range(0, len(data), BLOCK)
    blocks = [
        struct.pack("<BHH", start == starts[-1], len(part), len(part) ^ 0xFFFF) + part
        for start in starts
        for part in [data[start : start + BLOCK]]
    ]
    return b"\x78\x01" + b"".join(blocks) + struct.pack(">I", zlib.adler32(data))
