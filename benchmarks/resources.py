"""Seconds and memory of a process, for benchmarks that begin a process for each measurement. Needs nothing of nai_xl:
the version before is measured by the same lines.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

T = TypeVar("T")
ENOUGH = 2.0  # seconds that repeats may take together
MIB = 2**20


class Memory(NamedTuple):
    """Bytes of a process. rss: all that is in memory, pages of mapped files too, which the system takes back when it
    needs them, and those of other processes. private: what it has written and no other process shares (Private_Dirty).
    """

    rss: int
    private: int

    def __sub__(self, other: Memory) -> Memory:
        return Memory(self.rss - other.rss, self.private - other.private)


def memory(process: int | str = "self") -> Memory:
    """By /proc/PROCESS/smaps_rollup."""
    lines = (line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
    found = {words[0]: 1024 * int(words[1]) for words in lines}
    return Memory(found["Rss:"], found["Private_Dirty:"])


def settled() -> Memory:
    """This process's memory without what it has freed and not given back yet."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pa.default_memory_pool().release_unused()
    return memory()


class Peak:
    """`bytes`: how much more this process had in memory, at most, than when it was made. Linux notes the most."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = memory().rss

    @property
    def bytes(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) - self.before


class Times:
    """`found`: seconds by name. The first call counts as the others: a start makes it once."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def once(self, name: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        made = work()
        self.found[name] = time.perf_counter() - began
        return made

    def median(self, name: str, work: Callable[[], T], most: int = 5) -> T:
        """Of as many calls as there is time for."""
        times: list[float] = []
        while not times or (len(times) < most and sum(times) < ENOUGH):
            made = self.once(name, work)
            times.append(self.found[name])
        self.found[name] = statistics.median(times)
        return made


def each(work: Callable[[Any], object], over: list[Any], rounds: int) -> list[float]:
    """Seconds of every call, in order, after a round that warms up."""
    times = []
    for number in range(rounds + 1):
        for one in over:
            began = time.perf_counter()
            work(one)
            if number:
                times.append(time.perf_counter() - began)
    return sorted(times)


def rate(batches: Iterator[Any], count: int, warm: int) -> float:
    """Batches a second of `count`, after `warm`."""
    for _ in range(warm):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count / (time.perf_counter() - began)


def worker_growth(batches: Iterator[Any], early: int, late: int) -> tuple[Memory, Memory]:
    """The mean memory of the loader's workers after `early` batches, and how much of it came by `late`."""
    for _ in range(early):
        next(batches)
    before = _of_children()
    for _ in range(late - early):
        next(batches)
    return before, _of_children() - before


def _of_children() -> Memory:
    found = [memory(child.pid) for child in active_children() if child.pid]
    return Memory(*(sum(column) // len(found) for column in zip(*found, strict=True)))


def tell(found: dict[str, Any]) -> None:
    """The last line of this process's output."""
    print(json.dumps(found), flush=True)
