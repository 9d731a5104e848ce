"""What this process is doing, for the heartbeat that other processes read. A process does one thing at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Activity:
    """phase, ticks: how far the process is; two ranks that are equally far have the same. beats: signs of life between.

    lockstep: all ranks take part, and only phase, ticks and beats are progress. Otherwise the work of the processor or
    of the disk is progress too. waiting: for other ranks, which are the ones to make progress. held_up: by something
    outside of the run, for which it waits as long as it takes.
    """

    what: str = "starting"
    phase: int = 0
    ticks: int = 0
    beats: int = 0
    lockstep: bool = False
    waiting: bool = False
    held_up: bool = False


OWN = Activity()


def doing(what: str, *, lockstep: bool = False) -> None:
    """A new phase begins, on every rank. `what` completes the sentence "it was: ..."."""
    OWN.what, OWN.lockstep, OWN.ticks = what, lockstep, 0
    OWN.phase += 1


def tick() -> None:
    """Every rank has got here within its phase."""
    OWN.ticks += 1


def beat(what: str | None = None) -> None:
    """A sign of life of this rank alone; `what` is done next."""
    OWN.beats += 1
    if what is not None:
        OWN.what = what


@contextmanager
def waiting() -> Iterator[None]:
    """Inside the block this process waits for other ranks."""
    before, OWN.waiting = OWN.waiting, True
    try:
        yield
    finally:
        OWN.waiting = before
        OWN.ticks += 1


@contextmanager
def held_up() -> Iterator[None]:
    """Inside the block this process waits for something outside of the run, such as another run's lock."""
    OWN.held_up = True
    try:
        yield
    finally:
        OWN.held_up = False
