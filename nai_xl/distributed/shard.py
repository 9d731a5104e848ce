"""A tensor of which every rank holds some rows: how an engine that shards hands its state to a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a tensor that several ranks hold together; other ranks hold the others.

    local: [rows, ...], none for a rank that holds nothing of a small tensor. shape: of the whole tensor. start: the
    place of the first local row in the whole, along dimension 0.
    """

    local: Tensor
    shape: tuple[int, ...]
    start: int


class SavedTensor(Protocol):
    """A tensor in a checkpoint, however many files it is spread over. Nothing is read until it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def rows(self, start: int, stop: int) -> Tensor: ...
    def whole(self) -> Tensor: ...
