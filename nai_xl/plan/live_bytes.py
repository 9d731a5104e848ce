"""Counting, while operations run: the bytes of all tensors that are alive, and FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BLOCK = 512  # bytes; the CUDA caching allocator gives no less

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
COUNTED = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_FLASH],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_FLASH_BACKWARD],
}
"""Operation -> its FLOPs; torch's own registry has attention on a GPU only."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once, and the most there were; FLOPs.

    Storages are told apart by identity and forgotten when they are freed. `casts`: those of them that are copies of
    weights in another type.
    """

    def __init__(self, *, block: int = BLOCK):
        super().__init__()
        self.block, self.live, self.peak, self.casts = block, 0, 0, 0
        self.flops = 0
        self._alive: dict[int, int] = {}
        self._weights: set[int] = set()
        self._cast: set[int] = set()
        self.hidden = False

    def add(self, tensor: Tensor) -> int:
        """Count a tensor's storage unless it is counted already; its bytes if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or self.hidden:
            return 0
        size = -(-storage.nbytes() // self.block) * self.block
        self._alive[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)
        return size

    def add_weights(self, tensors: Sequence[Tensor]) -> int:
        self._weights.update(t.untyped_storage()._cdata for t in tensors)
        return sum(map(self.add, tensors))

    def _free(self, key: int) -> None:
        size = self._alive.pop(key)
        self.live -= size
        if key in self._cast:
            self._cast.remove(key)
            self.casts -= size

    @contextmanager
    def elsewhere(self, really: bool = True) -> Iterator[None]:
        """Tensors made inside the block lie on another device."""
        self.hidden, before = really or self.hidden, self.hidden
        try:
            yield
        finally:
            self.hidden = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := COUNTED.get(getattr(func, "_overloadpacket", None)):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (size := self.add(leaf)) and func is torch.ops.aten._to_copy.default:
                self._note_cast(args[0], leaf, size)
        return out

    def _note_cast(self, source: Tensor, copy: Tensor, size: int) -> None:
        if source.untyped_storage()._cdata in self._weights:
            self._cast.add(copy.untyped_storage()._cdata)
            self.casts += size


class RehearsedBytes(LiveBytes):
    """LiveBytes on tensors without values, for which a 0-dim operand of these in-place operations cannot be read."""

    ALLOCATE_NOTHING = frozenset(getattr(torch.ops.aten, f"_foreach_{name}_").Tensor for name in ("add", "mul", "div"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func in self.ALLOCATE_NOTHING else super().__torch_dispatch__(func, types, args, kwargs)
