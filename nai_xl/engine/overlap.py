"""Reading ahead and writing behind: what the encoding does beside the network's work."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

BEHIND = 3  # things that may wait to be done
T = TypeVar("T")


def readers() -> int:
    """Threads that decode pictures: this process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 2), 16)


class Behind:
    """A thread that does one thing after the other, while the caller goes on. An error is raised by a later call."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.begun: deque[Future[None]] = deque()

    def do(self, work: Any, *arguments: Any) -> None:
        while len(self.begun) >= BEHIND:
            self.begun.popleft().result()
        self.begun.append(self.pool.submit(work, *arguments))

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for future in self.begun:
                future.result()


def ahead(begun: Iterator[T], count: int) -> Iterator[T]:
    """The same, of which `count` more have always been made before one is given out."""
    waiting: deque[T] = deque()
    for one in begun:
        waiting.append(one)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def until(count: int, tickets: Iterator[int]) -> Iterator[int]:
    """Those below `count`."""
    for ticket in tickets:
        if ticket >= count:
            return
        yield ticket
