"""State of which every rank holds some rows, as parts of a checkpoint.

What is shaped as its parameter is cut as the parameter is. The form is that of an engine that keeps everything whole,
so that a run can be continued by any engine on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from nai_xl.distributed.shard import SavedTensor, Shard
from nai_xl.distributed.weights import refuse_others
from nai_xl.errors import UserError
from nai_xl.interfaces import Ema
from nai_xl.optimizer.part import Part


@dataclass
class ShardedWeights:
    """The trained weights. saves: whether this rank's rows are written, and not those of another replica."""

    reads_rows: ClassVar[bool] = True

    parameters: Mapping[str, nn.Parameter]
    parts: Mapping[Tensor, Part]
    saves: bool

    def state_dict(self) -> dict[str, Any]:
        return {name: shard(p.detach(), self.parts[p], self.saves) for name, p in self.parameters.items()}

    def load_state_dict(self, state: dict[str, SavedTensor]) -> None:
        """Raises UserError when names or shapes differ: a network must not be continued in part."""
        refuse_others(state, {name: self.parts[p] for name, p in self.parameters.items()})
        for name, p in self.parameters.items():
            p.data.copy_(rows(state[name], self.parts[p]))


@dataclass
class ShardedEma:
    """An average of which every rank keeps its rows: tensors of its state that are named after a parameter."""

    reads_rows: ClassVar[bool] = True

    ema: Ema
    parameters: Mapping[str, nn.Parameter]
    parts: Mapping[Tensor, Part]
    saves: bool

    def state_dict(self) -> dict[str, Any]:
        def cut(name: Any, value: Tensor) -> Any:
            p = self.parameters.get(name)
            return shard(value, self.parts[p], self.saves) if p is not None and value.shape == p.shape else value

        return mapped(
            self.ema.state_dict(), lambda name, value: cut(name, value) if isinstance(value, Tensor) else value
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def read(name: Any, value: Any) -> Any:
            p = self.parameters.get(name)
            return read_part(value, None if p is None else self.parts[p])

        self.ema.load_state_dict(mapped(state, read))


@dataclass
class ShardedOptimizer:
    """An optimizer that moves this rank's rows."""

    reads_rows: ClassVar[bool] = True

    optimizer: Any
    parts: Mapping[Tensor, Part]
    saves: bool

    def state_dict(self) -> dict[str, Any]:
        """Raises UserError for state that is neither shaped as its parameter nor one number."""
        whole = self.optimizer.state_dict()
        state = dict(whole["state"])
        for number, p in self._numbered(whole):
            if p in self.parts and number in state:
                state[number] = {key: self._cut(key, value, p) for key, value in state[number].items()}
        return {**whole, "state": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts = {number: self.parts.get(p) for number, p in self._numbered(state)}
        per_block = blocks_of(self.optimizer)
        found = {
            number: {key: read_part(value, parts.get(number), per_block.get(key)) for key, value in values.items()}
            for number, values in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": found})

    def _numbered(self, state: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
        for saved, own in zip(state["param_groups"], self.optimizer.param_groups, strict=True):
            yield from zip(saved["params"], own["params"], strict=True)

    def _cut(self, key: str, value: Any, p: Tensor) -> Any:
        part, block = self.parts[p], blocks_of(self.optimizer).get(key)
        if not isinstance(value, Tensor):
            return value
        if block:
            size = part.shape[0] * part.width // block
            return Shard(value if self.saves else value[:0], (size,), part.blocks(block)[0])
        if value.shape == p.shape:
            return shard(value, part, self.saves)
        if value.numel() == 1:
            return value
        kind = type(self.optimizer).__name__
        raise UserError(
            f"optimizer: {kind} keeps state ({key}) that a process which has some rows cannot save; "
            "set optimizer=adamw, or distributed=ddp"
        )


def blocks_of(optimizer: Any) -> Mapping[str, int]:
    """State that has one value for so many elements, by key: StochasticOptimizer.per_block, which torch's lack."""
    return getattr(optimizer, "per_block", {})


def shard(local: Tensor, part: Part, saves: bool) -> Shard:
    return Shard(local if saves else local[:0], part.shape, part.start)


def rows(saved: SavedTensor, part: Part) -> Tensor:
    return saved.rows(part.start, part.stop)


def read_part(value: Any, part: Part | None, block: int | None = None) -> Any:
    """This rank's part of a saved leaf; the whole of one that is not cut, and plain values as they are."""
    if not hasattr(value, "rows"):
        return value
    if part is not None and block:
        return value.rows(*part.blocks(block))
    return rows(value, part) if part is not None and tuple(value.shape) == part.shape else value.whole()


def mapped(tree: Any, change: Callable[[Any, Any], Any], name: Any = None) -> Any:
    """`tree` with change(key, leaf) for every leaf of its dicts."""
    if isinstance(tree, dict):
        return {key: mapped(value, change, key) for key, value in tree.items()}
    return change(name, tree)
