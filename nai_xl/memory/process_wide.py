"""Settings of torch that hold for the whole process, changed by one run and put back for the next arm of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_changes = ExitStack()


def change(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a module, such as torch.backends.cuda.matmul, until the end of the run."""
    _changes.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def afterwards(call: Callable[[], object]) -> None:
    """Call this at the end of the run."""
    _changes.callback(call)


@contextmanager
def restored() -> Iterator[None]:
    """After the block every setting changed inside it, or before it, is what it first was, newest change first."""
    try:
        yield
    finally:
        _changes.close()
