"""Whether all ranks of a run are well: threads in each tell the others what it does, and read what they do.

A rank that has died, that is frozen, or that holds up all others ends the job with a message that names it. The process
group's own timeout could not: it knows neither who is missing nor whether the first rank is encoding a million images.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from nai_xl.distributed import activity
from nai_xl.distributed.beats import DONE, STOPPED, Beat, Observer, Verdict
from nai_xl.distributed.launch import SIGNALS, Launcher
from nai_xl.distributed.start import joining
from nai_xl.distributed.strategy import Strategy
from nai_xl.errors import STOPPED_STATUS, Stopped, UserError, one_line, with_kind

GRACE = 10.0  # seconds in which the main thread may meet the end of another rank by itself


class Work:
    """Whether this process computes, reads or writes."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.before, self.at = self._sum(), time.monotonic()

    def _sum(self) -> tuple[float, int]:
        """Seconds of the processor, of processes begun from here too, and bytes read and written."""
        times = self.process.cpu_times()
        processor = times.user + times.system + times.children_user + times.children_system
        with suppress(psutil.AccessDenied, AttributeError):  # AttributeError: not on macOS
            return processor, sum(self.process.io_counters()[:4])
        return processor, 0

    def done(self) -> bool:
        """Whether there was some since the last call; the heartbeat itself needs less than what is counted."""
        now, sums = time.monotonic(), self._sum()
        seconds, before = now - self.at, self.before
        self.before, self.at = sums, now
        return sums[0] - before[0] > 0.05 * seconds or sums[1] - before[1] > 2**17 * seconds


class Exchange:
    """The beats of all ranks, in a store that the first rank keeps. Every rank makes one at the same time."""

    def __init__(self, strategy: Strategy, minutes: float):
        self.rank, self.keys = strategy.rank, [f"beat/{rank}" for rank in range(strategy.world)]
        connect = partial(
            TCPStore, os.environ["MASTER_ADDR"], wait_for_workers=False, timeout=timedelta(minutes=minutes)
        )
        port = 0
        if strategy.first:
            self.store = connect(port, is_master=True)
            port = self.store.port
        port = max(strategy.gather_objects([port]))
        if not strategy.first:
            try:
                self.store = connect(port, is_master=False)
            except DistError as error:
                raise UserError(
                    f"rank {self.rank} cannot reach rank 0 at {os.environ['MASTER_ADDR']}:{port}, by which ranks tell "
                    f"that they are well ({one_line(error)}); let the machines open connections to each other"
                ) from error

    def publish(self, beat: Beat) -> None:
        self.store.set(self.keys[self.rank], json.dumps(asdict(beat)))

    def read(self) -> dict[int, Beat]:
        return {rank: Beat(**json.loads(told)) for rank, told in enumerate(self.store.multi_get(self.keys))}


class Ears:
    """Hears signals while the main thread waits inside a collective and runs no handler. Made by the main thread."""

    def __init__(self) -> None:
        self.ear, self.mouth = socket.socketpair()
        self.ear.setblocking(False)
        self.mouth.setblocking(False)
        self.before = signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)
        self.asked, self.interrupts = False, 0

    def listen(self) -> None:
        with suppress(BlockingIOError):
            numbers = self.ear.recv(64)
            self.asked = self.asked or any(number in SIGNALS for number in numbers)
            self.interrupts += numbers.count(signal.SIGINT)

    def close(self) -> None:
        signal.set_wakeup_fd(self.before)
        self.mouth.close()
        self.ear.close()


@dataclass
class Heartbeat:
    """A context manager around all that a run does, on every rank. Of one process alone, only its launcher is watched.

    minutes: how long a rank may be silent, or all of them without progress. record: called on the first rank before
    this thread ends the process, with the error, or with None after a signal.

    Raises UserError in place of the error that a collective has met, where that was the end of another rank.
    """

    strategy: Strategy
    minutes: float
    record: Callable[[str | None], None]
    launcher: Launcher = field(default_factory=Launcher.found)

    def __post_init__(self) -> None:
        self.closing = threading.Event()
        self.last_word: str | None = None
        self.interval = min(1.0, self.minutes * 6)
        self.work = Work()
        self.own = Beat(socket.gethostname(), os.getpid(), _space())
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> Heartbeat:
        if self.strategy.world > 1:
            self.exchange, self.ears = Exchange(self.strategy, self.minutes), Ears()
            self._publish()
            with joining(self.minutes):  # nobody watches yet, and another rank may have found no way here
                self.strategy.wait()
            self.observer = Observer(self.strategy.rank, self.minutes * 60, time.monotonic())
            self.observer.hear(self.exchange.read(), time.monotonic())
            self._begin(self._talk, self._watch, self._follow_launcher)
        elif self.launcher:
            self._begin(self._follow_launcher)
        return self

    def _begin(self, *work: Callable[[], None]) -> None:
        self.threads = [threading.Thread(target=one, name=f"heartbeat{one.__name__}", daemon=True) for one in work]
        for thread in self.threads:
            thread.start()

    # --- threads ------------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        now = activity.OWN
        live = self.own.live
        if now.held_up:
            live += 1
        elif not now.lockstep and not now.waiting:
            live += self.work.done()
        self.own = replace(
            self.own,
            number=self.own.number + 1,
            what=now.what,
            phase=now.phase,
            ticks=now.ticks,
            beats=now.beats,
            live=live,
            waiting=now.waiting,
            asked=self.ears.asked,
            end=self.last_word,
        )
        self.exchange.publish(self.own)

    def _talk(self) -> None:
        """Tell and read, until the last word.

        Without the first rank there is nothing to read. While it is frozen, this thread stays in a call. `_watch` finds
        out in both cases.
        """
        with suppress(DistError):  # the first rank has ended
            while not self.closing.wait(self.interval):
                self.ears.listen()
                self._publish()
                self.observer.hear(self.exchange.read(), time.monotonic())
            self._publish()

    def _watch(self) -> None:
        """Ask this process to stop when another rank was asked, and end it when the job cannot go on."""
        woke, since, asked = time.monotonic(), 0.0, False
        while not self.closing.wait(self.interval):
            now = time.monotonic()
            if now - woke > 5 * self.interval + 5:
                self.observer.forgive(now)
            woke = now
            verdict = self.observer.verdict(now)
            if not asked and (self.observer.asked() or (verdict and verdict.stopped)):
                asked = True
                _ask_to_stop()
            if verdict is None and self.ears.interrupts < 2:
                since = now
            elif (verdict and verdict.certain) or now - since > GRACE:
                self._end_process(verdict)

    def _follow_launcher(self) -> None:
        """Ask this process to stop when whoever started it has ended."""
        while not self.closing.wait(self.interval):
            if gone := self.launcher.gone():
                with suppress(OSError):  # its output may have gone as well
                    print(f"\n{gone}: finishing the step, saving, stopping", file=sys.stderr, flush=True)
                _ask_to_stop()
                return

    def _end_process(self, verdict: Verdict | None) -> None:
        """End this process, whatever its main thread is doing. verdict: why; None after a second Ctrl-C."""
        if self.closing.is_set():
            return
        message = None if verdict is None or verdict.stopped else verdict.message
        if self.strategy.first:
            self.record(message)
        if message:
            with suppress(OSError):
                print(f"\nerror: {message}", file=sys.stderr, flush=True)  # a progress line may be open
        for pid in verdict.frozen if verdict else ():  # it would obey no launcher's SIGTERM
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os._exit(130 if verdict is None else STOPPED_STATUS if verdict.stopped else 1)

    # --- the end ------------------------------------------------------------------------------------------------------

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        cause = None
        if self.strategy.world > 1:
            cause = self._behind(error)
            if error is None:
                self.strategy.wait()
            self.last_word = _last_word(cause or error)
        self.closing.set()
        for thread in self.threads:
            thread.join(timeout=3.0)
        if self.strategy.world > 1:
            self.ears.close()
            if error and self.strategy.first and not _together(error):
                time.sleep(2 * self.interval)  # the others read the last word in a store that ends with this process
        if cause:
            raise cause from error

    def _behind(self, error: BaseException | None) -> Stopped | UserError | None:
        """What has caused an error, if the end of another rank has: collectives fail, and torchrun sends a SIGTERM."""
        if not isinstance(error, Stopped | RuntimeError) or _together(error):
            return None
        until = time.monotonic() + (1.5 if isinstance(error, Stopped) else 3.0)
        while time.monotonic() < until:
            if left := self.observer.left(time.monotonic()):
                return Stopped() if left.stopped else UserError(left.message)
            time.sleep(0.1)
        return None


def _together(error: BaseException) -> bool:
    return isinstance(error, Stopped) and error.together


def _last_word(error: BaseException | None) -> str:
    if error is None:
        return DONE
    return STOPPED if isinstance(error, KeyboardInterrupt) else f"failed: {with_kind(error)}"


def _ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _space() -> str:
    """Where process ids mean the same: a container has its own."""
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""
