"""The folder of one checkpoint: what is in it, whether it is whole, and how it is read.

    state.json                            the step, every part's tree, where the rows of tensors lie, all checksums
    <part>.safetensors                    the part's whole tensors, written by the first rank
    <part>-00002-of-00004.safetensors     the rows that the second of four ranks held

Nothing is pickled. state.json holds each file's length and CRC-32, and a CRC-32 of its own content. Folders of version
0.1 hold neither the checksums nor sharded tensors, and are read as well.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nai_xl.data.tensor_file import DTYPES, NAMES, measured
from nai_xl.distributed.shard import SavedTensor, Shard
from nai_xl.errors import with_kind

STATE = "state.json"
READERS = 4  # files that are verified at a time
UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)  # of content that is not ours
Leaf = Tensor | Shard


def split_tensors(value: Any, at: str, leaves: dict[str, Any]) -> Any:
    """`value` as JSON, its tensors and Shards moved to `leaves` under their place in it."""
    if isinstance(value, Tensor | Shard):
        while at in leaves:  # keys 1 and "1", or "a/b" and the b of an a
            at += "'"
        leaves[at] = value
        return {"tensor": at}
    if isinstance(value, dict):
        return {"items": [[key, split_tensors(item, f"{at}/{key}", leaves)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [split_tensors(item, f"{at}/{i}", leaves) for i, item in enumerate(value)]}
    return {"value": value}


def join_tensors(tree: Mapping[str, Any], tensor: Callable[[str], Any]) -> Any:
    """The inverse of `split_tensors`, with `tensor` of each place; tuples come back as lists."""
    if "tensor" in tree:
        return tensor(tree["tensor"])
    if "items" in tree:
        return {key: join_tensors(item, tensor) for key, item in tree["items"]}
    if "list" in tree:
        return [join_tensors(item, tensor) for item in tree["list"]]
    return tree["value"]


class Rows(NamedTuple):
    """Rows start to stop - 1 of a tensor, which lie in a file."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Sharded:
    """A tensor whose rows are spread over files, in ascending order and without gaps."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: tuple[Rows, ...]

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {"shape": self.shape, "dtype": NAMES[self.dtype], "rows": self.rows}

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Sharded:
        return cls(tuple(told["shape"]), DTYPES[told["dtype"]], tuple(Rows(*rows) for rows in told["rows"]))

    @classmethod
    def joined(cls, key: str, parts: Iterable[Sharded]) -> Sharded:
        """The tensor of which each rank tells its part. Rows that several ranks hold are taken from one of them.

        Raises ValueError where rows are missing or the ranks disagree.
        """
        parts = list(parts)
        shape, dtype = parts[0].shape, parts[0].dtype
        kept: list[Rows] = []
        end = 0
        held = (rows for part in parts for rows in part.rows if rows.start < rows.stop)
        for rows in sorted(held, key=lambda rows: (rows.start, rows.file)):
            if rows.start == end:
                kept.append(rows)
                end = rows.stop
            elif rows.stop > end:
                raise ValueError(f"{key}: no rank holds its rows from {end} on")
        if end != shape[0] or any((part.shape, part.dtype) != (shape, dtype) for part in parts):
            raise ValueError(f"{key}: the ranks hold {end} rows of a tensor of shape {shape}")
        return cls(shape, dtype, tuple(kept))


def describe(content: Mapping[str, Any]) -> str:
    """state.json with its own checksum."""
    return json.dumps({**content, "checksum": _own_sum(content)})


def _own_sum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words that follow its name; None if it is whole. Every byte is read."""
    try:
        content = _content(folder)
        if (step := content["step"]) != step_of(folder):
            return f"{STATE} says step {step}"
        if "files" in content:
            with ThreadPoolExecutor(READERS) as pool:
                wrong = pool.map(lambda item: _wrong(folder / item[0], item[1]), content["files"].items())
                return next((words for words in wrong if words), None)
        for name, tree in content["parts"].items():  # version 0.1: names and lengths are all that can be verified
            with safe_open(folder / f"{name}.safetensors", "pt") as file:
                join_tensors(tree, file.get_slice)
    except UNREADABLE as error:
        return with_kind(error)
    return None


def _content(folder: Path) -> dict[str, Any]:
    """state.json. Raises one of UNREADABLE if it is damaged."""
    content: Any = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{STATE} holds no JSON object")
    told = content.pop("checksum", None)
    if ("files" in content or told is not None) and told != _own_sum(content):
        raise ValueError(f"the checksum of {STATE} is wrong")
    return content


def _wrong(path: Path, told: Mapping[str, Any]) -> str | None:
    try:
        size, crc = measured(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    if size != told["bytes"]:
        return f"{path.name} has {size} bytes of {told['bytes']}"
    return None if f"{crc:08x}" == told["crc32"] else f"the checksum of {path.name} is wrong"


class Saved:
    """One tensor of a checkpoint, a distributed.shard.SavedTensor. `opened` gives a file's reader by its name."""

    def __init__(self, key: str, rows: Sequence[Rows], opened: Callable[[str], Any], sharded: Sharded | None = None):
        self.key, self.pieces, self.opened, self.sharded = key, rows, opened, sharded

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sharded.shape if self.sharded else tuple(self._slice(self.pieces[0]).get_shape())

    @property
    def dtype(self) -> torch.dtype:
        return self.sharded.dtype if self.sharded else DTYPES[self._slice(self.pieces[0]).get_dtype()]

    def _slice(self, piece: Rows) -> Any:
        return self.opened(piece.file).get_slice(self.key)

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, ...] from one file or several."""
        found = []
        for piece in self.pieces if self.sharded else [self.pieces[0]._replace(stop=self.shape[0])]:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                found.append(self._slice(piece)[low - piece.start : high - piece.start])
        return torch.cat(found) if found else torch.empty((0, *self.shape[1:]), dtype=self.dtype)

    def whole(self) -> Tensor:
        if self.sharded:
            return self.rows(0, self.shape[0])
        tensor: Tensor = self.opened(self.pieces[0].file).get_tensor(self.key)
        return tensor


class Reader:
    """Reads the checkpoint in `folder`, which is whole."""

    def __init__(self, folder: Path):
        self.folder, self.content = folder, _content(folder)
        self.sharded = {key: Sharded.read(told) for key, told in self.content.get("sharded", {}).items()}
        self._opened = lru_cache(maxsize=None)(lambda name: safe_open(folder / name, "pt"))

    @property
    def parts(self) -> Mapping[str, Any]:
        """Name of a part -> its tree."""
        parts: Mapping[str, Any] = self.content["parts"]
        return parts

    def part(self, name: str, *, whole: bool) -> Any:
        """A part's state with whole tensors, or with SavedTensors in their place."""

        def tensor(key: str) -> SavedTensor | Tensor:
            sharded = self.sharded.get(key)
            rows = sharded.rows if sharded else (Rows(f"{name}.safetensors", 0, 0),)
            saved = Saved(key, rows, self._opened, sharded)
            return saved.whole() if whole else saved

        return join_tensors(self.parts[name], tensor)
