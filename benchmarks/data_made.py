"""Generated inputs of benchmarks/data.py: index files of any size, without pictures; a cache that has all of its keys,
without latents; folders of tiny pictures. Seeded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

BLOCK = 1 << 20  # rows of a piece, as the index files of data=folder have them
BATCH = 8
CHUNK = 256  # positions of the plan that share a bucket: 8 images on each of 32 processes
READ, READ_SMALL = 512, 16384  # entries that are read, at SDXL's size and small ones
SMALL = 64  # pixels
RECIPE = "benchmark"
WORDS = [
    f"{colour} {thing}"
    for colour in ("red", "blue", "green", "grey", "dark", "light", "striped", "plain")
    for thing in ("hair", "eyes", "sky", "dress", "shoes", "hat", "window", "smile")
]
TAGS = 8  # of a caption


def write_index(file: Path, count: int) -> None:
    """An index file of `count` images of many sizes, each with a caption of nine tags, in order."""
    from nai_xl.data.rows import SCHEMA  # the version before has none

    draw = np.random.default_rng(0)
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, SCHEMA) as writer:
        for start in range(0, count, BLOCK):
            numbers = np.arange(start, min(start + BLOCK, count))
            writer.write_batch(pa.record_batch(_columns(numbers, count, draw), schema=SCHEMA))


def _columns(numbers: NDArray[Any], count: int, draw: np.random.Generator) -> list[Any]:
    rows = len(numbers)
    contents = draw.integers(0, 256, (rows, 32), np.uint8)
    contents[:, :8] = ((numbers + draw.random(rows)) / count * 2.0**64).astype(">u8").view(np.uint8).reshape(-1, 8)
    names = pa.array(numbers).cast(pa.string())
    tags = [pa.array(WORDS).take(pa.array(draw.integers(0, len(WORDS), rows))) for _ in range(TAGS)]
    captions = pc.binary_join_element_wise(pc.binary_join_element_wise("picture", names, " "), *tags, ", ")
    sides = draw.integers(512, 2048, (2, rows), np.int32)
    sides[:, ::2] = sides[:, draw.integers(0, min(rows, 100), len(sides[0, ::2]))]  # half of them have a common size
    return [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, pa.py_buffer(contents.tobytes())]),
        pa.array(sides[0]),
        pa.array(sides[1]),
        pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32)), captions),
        pc.binary_join_element_wise("pictures/", names, ".jpg", "").cast(pa.binary()),
    ]


def sparse_shards(folder: Path, keys: NDArray[np.uint8]) -> None:
    """Shards of bf16 latents [4,128,128] under `keys` [M,16], as long as real ones, of which no byte is written.

    What is read of them is damaged: they are there to be looked for.
    """
    import torch

    from nai_xl.data.shards.layout import Layout
    from nai_xl.data.shards.shard import FULL, KEYS, RECORD, SEALED

    folder.mkdir(parents=True)
    layout = Layout.of({"latents": torch.empty(4, 128, 128, dtype=torch.bfloat16)})
    order = np.random.default_rng(0).permutation(len(keys))  # of encoding: by bucket, not by content
    each = -(-FULL // layout.stride)
    for number, start in enumerate(range(0, len(keys), each)):
        some = keys[order[start : start + each]]
        records = np.zeros(len(some), RECORD)
        records["hi"], records["lo"] = np.ascontiguousarray(some).view(">u8").T
        stem = folder / f"{layout.kind}-{number:012x}"
        Path(f"{stem}{KEYS}").write_bytes(layout.line + records.tobytes())
        with Path(f"{stem}{SEALED}").open("wb") as file:
            file.write(layout.header(len(some)))
            file.truncate(layout.base + len(some) * layout.stride)


def write_folder(folder: Path, count: int) -> None:
    """`count` pictures of 16 x 16 pixels in folders of a thousand, each with a caption in a .txt file."""
    made = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(made, "png")
    for number in range(count):
        place = folder / f"{number // 1000:05}"
        if number % 1000 == 0:
            place.mkdir(parents=True)
        # bytes after the end of the picture make it another file
        (place / f"{number}.png").write_bytes(made.getvalue() + number.to_bytes(8, "little"))
        (place / f"{number}.txt").write_text(f"picture {number}, {', '.join(WORDS[number % 50 :: 7])}")


def middle(count: int) -> int:
    """A position in the middle of the third epoch."""
    return (2 * count + count // 2) // BATCH * BATCH


def read_first(sampler: Callable[[Any, int], Iterable[Any]], rows: Any, count: int) -> list[int]:
    """The first images that a run reads which goes on from the middle. sampler: rows, a position -> its batches."""
    found: list[int] = []
    for batch in sampler(rows, middle(len(rows))):
        found += [number for _, number in batch]
        if len(found) >= count:
            return list(dict.fromkeys(found))
    raise AssertionError("a plan is endless")
