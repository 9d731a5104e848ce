"""What the ranks of a run say of themselves, and what an observer concludes from it. Pure: no thread, no store."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import psutil

STOPPED = "was asked to stop"  # last words; others begin with "failed: "
DONE = "is done"


@dataclass(frozen=True)
class Beat:
    """What one rank says of itself. ids of processes mean the same in one `space`. end: its last word, if it had one.

    live: grows with the work of the processor and the disk. asked: a signal has asked this rank to stop.
    """

    host: str
    pid: int
    space: str
    number: int = 0
    what: str = "starting"
    phase: int = 0
    ticks: int = 0
    beats: int = 0
    live: int = 0
    waiting: bool = False
    asked: bool = False
    end: str | None = None

    @property
    def progress(self) -> tuple[int, ...]:
        return self.phase, self.ticks, self.beats, self.live


@dataclass
class Seen:
    """What an observer knows of a rank: its newest beat, and when it and its progress last changed, in seconds."""

    beat: Beat
    heard: float
    moved: float
    missing: float | None = None  # since when there is no such process

    def hear(self, beat: Beat, now: float) -> None:
        if beat.number != self.beat.number:
            self.heard = now
        if beat.progress != self.beat.progress:
            self.moved = now
        self.beat = beat


@dataclass(frozen=True)
class Verdict:
    """Why the job must end.

    certain: nothing else will end it, so do it at once. Otherwise the main thread gets a while to meet the same error
    by itself. frozen: processes of this machine that do not answer.
    """

    message: str
    certain: bool = False
    stopped: bool = False
    frozen: tuple[int, ...] = ()


@dataclass
class Observer:
    """Decides, for `rank`, whether the job can go on. timeout: seconds. read: when the beats were last read.

    The first rank keeps the beats, so all fall silent when it does.
    """

    rank: int
    timeout: float
    read: float
    seen: dict[int, Seen] = field(default_factory=dict)

    def hear(self, beats: dict[int, Beat], now: float) -> None:
        self.read = now
        for rank, beat in beats.items():
            self.seen.setdefault(rank, Seen(beat, now, now)).hear(beat, now)

    def forgive(self, now: float) -> None:
        """This process was frozen itself: the others have a fresh start."""
        self.read = now
        for seen in self.seen.values():
            seen.heard = seen.moved = now

    def asked(self) -> bool:
        """Whether a signal has asked another rank to stop."""
        return any(seen.beat.asked for rank, seen in self.seen.items() if rank != self.rank)

    def verdict(self, now: float) -> Verdict | None:
        """None while all is well."""
        if left := self.left(now):
            return left
        if now - self.read > self.timeout:
            return self._silent([0])
        silent = [rank for rank, seen in self.seen.items() if self.read - seen.heard > self.timeout]
        if silent:
            return self._silent(silent)
        if all(self.read - seen.moved > self.timeout for seen in self.seen.values()):
            busy = [rank for rank, seen in self.seen.items() if not seen.beat.waiting] or list(self.seen)
            behind = min(self._place(rank) for rank in busy)
            return self._overdue([rank for rank in busy if self._place(rank) == behind], "made progress")
        return None

    def left(self, now: float) -> Verdict | None:
        """Whether another rank has ended, while this one goes on."""
        for rank, seen in self.seen.items():
            if rank != self.rank and seen.beat.end not in (None, DONE):
                stopped = seen.beat.end == STOPPED
                return Verdict(f"{self._who(rank)} {seen.beat.end}; it was: {seen.beat.what}", stopped=stopped)
        for rank, seen in self.seen.items():
            if rank != self.rank and self._died(seen, now):
                return Verdict(f"{self._who(rank)} has died; it was: {seen.beat.what}")
        return None

    def _died(self, seen: Seen, now: float) -> bool:
        """Whether a process of this machine has been missing for a second: after its last word it may end at once."""
        if seen.beat.end or not self._near(seen.beat) or running(seen.beat.pid):
            seen.missing = None
        elif seen.missing is None:
            seen.missing = now
        return seen.missing is not None and now - seen.missing > 1

    def _near(self, beat: Beat) -> bool:
        """Whether a process of that id here is the rank."""
        here = self.seen[self.rank].beat
        return (beat.host, beat.space) == (here.host, here.space)

    def _place(self, rank: int) -> tuple[int, int]:
        """How far a rank is; equal on ranks that are equally far."""
        return self.seen[rank].beat.phase, self.seen[rank].beat.ticks

    def _who(self, rank: int) -> str:
        beat = self.seen[rank].beat
        return f"rank {rank} ({beat.host}, pid {beat.pid})"

    def _silent(self, ranks: list[int]) -> Verdict:
        beats = [self.seen[rank].beat for rank in ranks]
        frozen = tuple(beat.pid for beat in beats if self._near(beat))
        return replace(self._overdue(ranks, "answered"), frozen=frozen)

    def _overdue(self, ranks: list[int], what: str) -> Verdict:
        minutes = f"{self.timeout / 60:g}"
        told = "; ".join(
            f"{self._who(rank)} has not {what} for {minutes} minutes, it was: {self.seen[rank].beat.what}"
            for rank in ranks
        )
        return Verdict(f"{told} (distributed.timeout={minutes})", certain=True)


def running(pid: int) -> bool:
    """Whether there is such a process that has not ended; one may have ended and not been waited for."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
