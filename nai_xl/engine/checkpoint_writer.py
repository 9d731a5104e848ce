"""Writing one checkpoint from all ranks: each writes its own files, and the first puts the folder in its place.

A thread of each rank writes, and threads must not call collectives. So a rank tells the first through the folder, which
all of them share: done-<rank>.json says what it has written, or why it could not.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nai_xl.data.tensor_file import write_tensors
from nai_xl.distributed.shard import Shard
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.checkpoint_files import STATE, Rows, Sharded, describe
from nai_xl.engine.snapshot import HostMemory
from nai_xl.errors import UserError, one_line
from nai_xl.files import sync, write_atomically

FORMAT = 2
PATIENCE = 900.0  # seconds that the first rank waits for the files of the others after its own
POLL = 0.05


@dataclass
class Parts:
    """The state of all parts. trees: part -> its tree; leaves: part -> place -> Tensor or Shard."""

    trees: dict[str, Any] = field(default_factory=dict)
    leaves: dict[str, dict[str, Tensor | Shard]] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether some tensor is spread over the ranks: the same on all of them."""
        return any(isinstance(leaf, Shard) for leaves in self.leaves.values() for leaf in leaves.values())


@dataclass
class Written:
    """What one rank has written. files: name -> bytes and CRC-32; sharded: place of a tensor -> this rank's part."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    sharded: dict[str, Sharded] = field(default_factory=dict)


class Writer:
    """Copies and writes this rank's share. `begin` and `copy` are for the training's thread, `write` for another."""

    def __init__(self, strategy: Strategy):
        self.strategy, self.memory = strategy, HostMemory()

    def begin(self, final: Path) -> None:
        """On the first rank: make an empty folder beside `final`. Raises UserError."""
        if self.strategy.first:
            try:
                shutil.rmtree(_aside(final), ignore_errors=True)
                _aside(final).mkdir(parents=True)
                sync(final.parent.parent)
            except OSError as error:
                raise _refusal(final, error) from error

    def copy(self, parts: Parts) -> None:
        """Put copies in main memory in the place of this rank's tensors, and leave out those that it does not write."""
        mine: dict[str, Tensor] = {}
        for leaves in parts.leaves.values():
            for place, leaf in list(leaves.items()):
                if isinstance(leaf, Shard):
                    mine[place] = leaf.local
                elif self.strategy.first:
                    mine[place] = leaf
                else:
                    del leaves[place]
        copies = self.memory.copy(mine)
        for leaves in parts.leaves.values():
            for place, leaf in leaves.items():
                copy = copies[place]
                leaves[place] = Shard(copy, leaf.shape, leaf.start) if isinstance(leaf, Shard) else copy

    def write(self, final: Path, content: Mapping[str, Any], parts: Parts) -> None:
        """Write this rank's files, and on the first rank all that makes the folder a checkpoint.

        Raises UserError when the disk cannot take them; earlier checkpoints are whole.
        """
        aside, first = _aside(final), self.strategy.first
        try:
            self.memory.wait()
            written = self._write_tensors(aside, parts)
            if first:
                others = self._wait_for_others(aside) if parts.sharded else []
                _describe(aside, content, parts, [written, *others])
                shutil.rmtree(final, ignore_errors=True)
                aside.rename(final)
                sync(final.parent)
            elif parts.sharded:
                self._tell(aside, {"files": written.files, "sharded": _told(written.sharded)})
        except (OSError, ValueError, KeyError) as error:  # KeyError: a dtype that the format does not have
            if first:
                shutil.rmtree(aside, ignore_errors=True)
            else:
                self._tell_failure(aside, error)
            raise _refusal(final, error) from error

    def _write_tensors(self, aside: Path, parts: Parts) -> Written:
        written = Written()
        for name, leaves in parts.leaves.items():
            if self.strategy.first:
                whole = {place: leaf for place, leaf in leaves.items() if isinstance(leaf, Tensor)}
                written.files |= _written(aside / f"{name}.safetensors", whole)
            shards = {place: leaf for place, leaf in leaves.items() if isinstance(leaf, Shard)}
            if shards:
                file = f"{name}-{self.strategy.rank + 1:05d}-of-{self.strategy.world:05d}.safetensors"
                written.files |= _written(aside / file, {place: shard.local for place, shard in shards.items()})
                for place, shard in shards.items():
                    rows = Rows(file, shard.start, shard.start + len(shard.local))
                    written.sharded[place] = Sharded(tuple(shard.shape), shard.local.dtype, (rows,))
        return written

    def _tell(self, aside: Path, words: Mapping[str, Any]) -> None:
        text = json.dumps(words)
        write_atomically(aside / _done(self.strategy.rank), lambda path: path.write_text(text, encoding="utf-8"))

    def _tell_failure(self, aside: Path, error: Exception) -> None:
        try:
            self._tell(aside, {"error": one_line(error)})
        except OSError:
            return  # the first rank ends its wait without it

    def _wait_for_others(self, aside: Path) -> list[Written]:
        """What the other ranks have written. Raises ValueError for one that could not, or has not in time."""
        until = time.monotonic() + PATIENCE
        found: list[Written] = []
        for rank in range(1, self.strategy.world):
            done = aside / _done(rank)
            while not done.exists():
                if time.monotonic() > until:
                    raise ValueError(f"rank {rank} has not written its part in {PATIENCE:.0f} s")
                time.sleep(POLL)
            told = json.loads(done.read_text(encoding="utf-8"))
            if "error" in told:
                raise ValueError(f"rank {rank}: {told['error']}")
            sharded = {place: Sharded.read(one) for place, one in told["sharded"].items()}
            found.append(Written(told["files"], sharded))
            done.unlink()
        return found


def _aside(final: Path) -> Path:
    return final.with_suffix(".tmp")


def _done(rank: int) -> str:
    return f"done-{rank:05d}.json"


def _told(sharded: Mapping[str, Sharded]) -> dict[str, Any]:
    return {place: one.told() for place, one in sharded.items()}


def _written(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    size, crc = write_tensors(path, tensors)
    sync(path)
    return {path.name: {"bytes": size, "crc32": f"{crc:08x}"}}


def _describe(aside: Path, content: Mapping[str, Any], parts: Parts, written: list[Written]) -> None:
    """Write state.json, the last file, and wait until the folder is on the disk."""
    sharded = {place: Sharded.joined(place, [one.sharded[place] for one in written]) for place in written[0].sharded}
    files = {name: told for one in written for name, told in one.files.items()}
    text = describe({"format": FORMAT, **content, "parts": parts.trees, "sharded": _told(sharded), "files": files})
    (aside / STATE).write_text(text, encoding="utf-8")
    sync(aside / STATE)
    sync(aside)


def _refusal(final: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot write the checkpoint {final} ({one_line(error)}). Earlier checkpoints are whole: free space, or set "
        "output_dir=DIR, and run the same command again."
    )
