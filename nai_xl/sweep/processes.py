"""Programs in processes of their own: one at a time in each slot, with the output in a file."""

from __future__ import annotations

import os
import re
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

from nai_xl.distributed.launch import SWEEP, Process

WORKER_ENDED = re.compile(r"exitcode\s*:\s*(-?\d+)")  # in torchrun's report, which has the first cause last


@dataclass(frozen=True)
class Program:
    """A command whose output is appended to `log`."""

    command: Sequence[str]
    log: Path
    workers: bool = False  # the command is torchrun, and its children do the work


@dataclass
class Running:
    """A program under way in `slot`. `number` is its place among all programs."""

    number: int
    program: Program
    slot: int
    process: subprocess.Popen[bytes]
    log_began: int  # the log's length when this process began
    began: float = field(default_factory=time.monotonic)
    asked: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def interrupt(self) -> None:
        """Ask it once to end after the step in hand, with a SIGINT as a Ctrl-C sends it.

        torchrun would give its workers only 30 seconds for their checkpoints, so the workers are asked, not torchrun.
        """
        if not self.asked:
            self.asked = True
            workers = _descendants(self.process.pid, recursive=False) if self.program.workers else []
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
    """Whether an end was asked for; engine.stop.Stop is one."""

    asked: bool


def run_all(
    programs: Sequence[Program],
    environments: Sequence[Mapping[str, str]],
    stop: Asked,
    *,
    begun: Callable[[Running], None],
    ended: Callable[[Running, int], None],
    watch: Callable[[Sequence[Running]], None],
) -> int:
    """Run the programs in their order, one in each slot at a time. Returns how many were begun.

    `environments`: what each slot adds to the environment, one for each slot. Once `stop` is asked, running programs
    are asked to stop and no more are begun; a KeyboardInterrupt after that kills them. `ended` is given the exit
    status, negative for a signal; `watch` is called several times a second.
    """
    waiting, free = deque(enumerate(programs)), deque(range(len(environments)))
    running: list[Running] = []
    try:
        while running or (waiting and not stop.asked):
            while waiting and free and not stop.asked:
                number, program = waiting.popleft()
                slot = free.popleft()
                running.append(_start(number, program, slot, environments[slot]))
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
    finally:  # after an interruption, some are still running
        for one in running:
            one.kill()
        for one in running:
            ended(one, int(one.process.returncode))
    return len(programs) - len(waiting)


def _start(number: int, program: Program, slot: int, environment: Mapping[str, str]) -> Running:
    program.log.parent.mkdir(parents=True, exist_ok=True)
    with program.log.open("ab") as log:
        length = log.seek(0, os.SEEK_END)
        # a new session, because a terminal's Ctrl-C reaches every process of this one and would ask it twice
        process = subprocess.Popen(
            program.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, SWEEP: str(Process.of(os.getpid()))},
            start_new_session=True,
        )
        return Running(number, program, slot, process, length)


def why(code: int, log: str) -> str:
    """Why a process ended that could not say so itself: its signal, or the last error in its output."""
    workers = WORKER_ENDED.findall(log)
    cause = int(workers[-1]) if workers else code
    if cause < 0:
        return f"killed by signal {-cause}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    return [*lines, *errors][-1].removeprefix("error: ") if lines else f"exit status {code}"
