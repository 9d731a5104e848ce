"""How many bytes an optimizer's state takes, counted on the state that it makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nai_xl.optimizer.stochastic import StochasticOptimizer


def state_bytes(make: Callable[..., Any], shapes: Iterable[Iterable[int]], dtype: torch.dtype) -> int:
    """Bytes of state that `make(params=...)` keeps for parameters of these shapes after a step.

    One parameter of each distinct shape is stepped; ours need no memory for it, a library's the largest shape's on the
    CPU. Exact where a parameter's state depends on its own shape only.
    """
    counts = Counter(tuple(shape) for shape in shapes)
    return sum(count * _bytes_of_one(make, shape, dtype) for shape, count in counts.items())


def _bytes_of_one(make: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype) -> int:
    ours = isinstance(make(params=[nn.Parameter(torch.zeros(1, dtype=dtype))]), StochasticOptimizer)
    p = nn.Parameter(torch.zeros(shape, dtype=dtype, device="meta" if ours else "cpu"))
    p.grad = torch.zeros_like(p)
    optimizer = make(params=[p])
    optimizer.step()
    return sum(stored_bytes(value) for value in optimizer.state[p].values())


def stored_bytes(value: Any) -> int:
    """Bytes of a tensor, of the tensors that a subclass is made of, or 0 for a number."""
    if not isinstance(value, Tensor):
        return 0
    if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()
