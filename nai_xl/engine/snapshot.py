"""A copy of tensors in main memory, so that training can change them while the copy is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SLAB = 1 << 30  # bytes allocated at a time: torch rounds pinned memory up to a power of two
ALIGNED = 64


class HostMemory:
    """Memory for one copy after another, allocated once: as much as the largest copy needs.

    Pinned where a tensor lies on a GPU. Its copies are then made on the stream of the training itself, so that the next
    optimizer step comes after them, and nobody has to wait here.
    """

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []
        self.copied: torch.cuda.Event | None = None

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous copies, valid until the next call; read them after `wait`."""
        sizes = [-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors.values()]
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        places = self._places(sizes, pinned)
        copies = {}
        for (name, tensor), (slab, start) in zip(tensors.items(), places, strict=True):
            room = self.slabs[slab][start : start + tensor.nbytes]
            copies[name] = room.view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor.detach(), non_blocking=True)
        if pinned:
            self.copied = torch.cuda.Event()
            self.copied.record()
        return copies

    def wait(self) -> None:
        """Return when the last copies are whole."""
        if self.copied:
            self.copied.synchronize()

    def _places(self, sizes: Sequence[int], pinned: bool) -> list[tuple[int, int]]:
        """A slab and the byte in it for each size; slabs are allocated as they are needed."""
        places: list[tuple[int, int]] = []
        used = [0]
        for size in sizes:
            if used[-1] and used[-1] + size > SLAB:
                used.append(0)
            places.append((len(used) - 1, used[-1]))
            used[-1] += size
        for number, size in enumerate(used):
            if number == len(self.slabs):
                self.slabs.append(_empty(size, pinned))
            elif len(self.slabs[number]) < size or self.slabs[number].is_pinned() != pinned:
                self.slabs[number] = _empty(size, pinned)
        return places


def _empty(size: int, pinned: bool) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned and size > 0)
