"""The part of a tensor that one process keeps, where several keep a tensor together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a tensor of `shape`, which `count` processes share; this one is `number`.

    The cut is torch.chunk's, along dimension 0: every process has `each` rows, but for the last ones, which may have
    fewer or none.
    """

    shape: tuple[int, ...]
    number: int
    count: int

    @cached_property
    def each(self) -> int:
        return -(-self.shape[0] // self.count)

    @cached_property
    def start(self) -> int:
        return min(self.shape[0], self.number * self.each)

    @cached_property
    def stop(self) -> int:
        return min(self.shape[0], self.start + self.each)

    @cached_property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    @cached_property
    def first(self) -> int:
        """The place of the part's first element in the whole tensor, in row-major order."""
        return self.start * self.width

    def cut_between(self, block: int) -> bool:
        """Whether every process's part begins with a whole block of `block` elements."""
        return self.each >= self.shape[0] or self.each * self.width % block == 0

    def blocks(self, block: int) -> tuple[int, int]:
        """The blocks of `block` elements that hold this part: the first, and the one after the last."""
        return self.first // block, -(-self.stop * self.width // block)


def in_parts(optimizer: Any, parts: Mapping[Tensor, Part]) -> None:
    """Tell an optimizer which parts its parameters are; those that round stochastically or keep blocks ask for it."""
    optimizer.parts = parts


def needs_whole_tensors(make: Any) -> bool:
    """Whether an optimizer class, or a partial of one, computes with a whole tensor's rows, columns or norm.

    Ours say so by the member `whole_tensors`, which torch's lack: those of torch are named here.
    """
    kind = getattr(make, "func", make)
    named = kind.__module__.startswith("torch.optim") and kind.__name__ in ("Adafactor", "LBFGS", "Muon")
    return named or bool(getattr(kind, "whole_tensors", False))
