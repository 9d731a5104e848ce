"""Programs in processes of their own: so many at a time, each in its slot, with its output in a file."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil


@dataclass(frozen=True)
class Task:
    """A command whose output is appended to `log`."""

    command: Sequence[str]
    log: Path
    workers: bool = False  # torchrun's: the work is done by its children


@dataclass
class Running:
    """A task under way in `slot`."""

    number: int
    task: Task
    slot: int
    process: subprocess.Popen[bytes]
    log_began: int  # the log's length when this process began
    began: float = field(default_factory=time.monotonic)
    asked: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def interrupt(self) -> None:
        """Ask once for an end after the step in hand, by the SIGINT of a Ctrl-C.

        torchrun itself would give its workers 30 seconds for their checkpoints, so that they are asked and not it.
        """
        if not self.asked:
            self.asked = True
            workers = _descendants(self.process.pid, recursive=False) if self.task.workers else []
            for pid in [worker.pid for worker in workers] or [self.process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)

    def kill(self) -> None:
        """End it and all its descendants at once."""
        for pid in [*(process.pid for process in _descendants(self.process.pid)), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _descendants(pid: int, *, recursive: bool = True) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=recursive))
    return []


class Asked(Protocol):
    """Whether an end was asked for, as engine.loop.Stop knows."""

    asked: bool


def run_all(
    tasks: Sequence[Task],
    environments: Sequence[Mapping[str, str]],
    stop: Asked,
    *,
    begun: Callable[[Running], None],
    ended: Callable[[Running, int], None],
    watch: Callable[[Sequence[Running]], None],
) -> int:
    """Run the tasks in their order, one in each slot at a time; the number of those begun.

    `environments`: what each slot adds to the environment; there are as many slots. After `stop` was asked, running
    tasks are asked to stop, and no more are begun; a KeyboardInterrupt meanwhile kills them. `ended` is told the exit
    status, negative for a signal; `watch` is called several times a second.
    """
    waiting, free = deque(enumerate(tasks)), deque(range(len(environments)))
    running: list[Running] = []
    try:
        while running or (waiting and not stop.asked):
            while waiting and free and not stop.asked:
                number, task = waiting.popleft()
                slot = free.popleft()
                running.append(_start(number, task, slot, environments[slot]))
                begun(running[-1])
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.slot)
                ended(one, int(one.process.returncode))
            if stop.asked:
                for one in running:
                    one.interrupt()
            watch(running)
            time.sleep(0.2)
    finally:  # nothing is left then but after an interruption
        for one in running:
            one.kill()
            ended(one, int(one.process.returncode))
    return len(tasks) - len(waiting)


def _start(number: int, task: Task, slot: int, environment: Mapping[str, str]) -> Running:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log:
        length = log.seek(0, os.SEEK_END)
        # a session of its own: a terminal's Ctrl-C reaches every process of ours, and this one would be asked twice
        process = subprocess.Popen(
            task.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        return Running(number, task, slot, process, length)
