"""How ranks share out work of unequal length: each takes the next piece when it is free, so that none waits long."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import distributed

from nai_xl.distributed import activity

POLL = 0.02  # seconds between two looks into the store; a call that waits there would keep other threads from it


class Team(Protocol):
    """Every rank calls `told` and `wait` in the same order."""

    rank: int
    world: int

    def told(self, words: bytes | None) -> bytes:
        """What the first rank passes, on all of them. Others pass None, and wait."""
        ...

    def tickets(self) -> Iterator[int]:
        """0, 1, 2 ... without end, each on one rank only; a new count after each `told`."""
        ...

    def wait(self) -> None:
        """Return when every rank has got here."""
        ...


@dataclass
class Alone:
    """A team of one."""

    rank: int = 0
    world: int = 1

    def told(self, words: bytes | None) -> bytes:
        assert words is not None
        return words

    def tickets(self) -> Iterator[int]:
        return itertools.count()

    def wait(self) -> None:
        pass


@dataclass
class StoreTeam:
    """Ranks that share a torch.distributed store; `name` sets what they keep there apart from others' keys."""

    store: Any
    rank: int
    world: int
    name: str = "team"
    times: int = field(default=0, init=False)

    def _key(self, what: str) -> str:
        return f"{self.name}/{self.times}/{what}"

    def told(self, words: bytes | None) -> bytes:
        self.times += 1
        key = self._key("told")
        if self.rank == 0:
            assert words is not None
            self.store.set(key, words)
            return words
        self._until(lambda: bool(self.store.check([key])))
        return bytes(self.store.get(key))

    def tickets(self) -> Iterator[int]:
        key = self._key("ticket")
        return iter(lambda: int(self.store.add(key, 1)) - 1, None)

    def wait(self) -> None:
        self.times += 1
        key = self._key("here")
        self.store.add(key, 1)
        self._until(lambda: int(self.store.add(key, 0)) == self.world)

    def _until(self, true: Callable[[], bool]) -> None:
        with activity.waiting():
            while not true():
                time.sleep(POLL)


TEAMS = itertools.count()  # made by this process; every rank makes as many


def team(rank: int, world: int) -> Team:
    """The processes of the run, which must all have joined; Alone if there is no other."""
    if world == 1:
        return Alone()
    return StoreTeam(distributed.distributed_c10d._get_default_store(), rank, world, f"nai_xl/{next(TEAMS)}")
