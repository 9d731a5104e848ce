"""Dry runs: steps on tensors without storage, to count what a GPU would hold.

torch's own operations run on such tensors as they are. Triton kernels cannot: what launches them asks `active`, and in
a dry run allocates what they would and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_active: ContextVar[bool] = ContextVar("dry_run", default=False)


def active() -> bool:
    """Whether a GPU's kernels are counted in place of what this machine would compute."""
    return _active.get()


@contextmanager
def of_a_gpu() -> Iterator[None]:
    """Inside the block steps are counted as on a GPU, whatever device their tensors are on."""
    before = _active.set(True)
    try:
        yield
    finally:
        _active.reset(before)
