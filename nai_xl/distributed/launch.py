"""How this process was started: by which launcher, as one of how many, and whether the launcher is still there."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

import nai_xl
from nai_xl.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # each asks for an orderly end
SWEEP = "NAI_XL_SWEEP"  # what a sweep's arms find in their environment: its process, as Process.of has it in words
PARTS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of one launch: all of them, or none
MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
HELP = "start with torchrun, or see docs/distributed.md"


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """The number of processes, which every launcher puts into the environment; 1 where its variables make no sense."""
    found = environ.get("WORLD_SIZE", "")
    return int(found) if found.isdecimal() and int(found) else 1


def several(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started several processes of this run; False where its variables make no sense."""
    return world_size(environ) > 1


def refuse_half_a_launch(*, several: bool, environ: Mapping[str, str] = os.environ) -> None:
    """Raises UserError for variables of a launch that are not numbers, or are only a part of one.

    several: whether the run is meant to use several processes.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if name in environ and not environ[name].isdecimal():
            raise UserError(f"{name}={environ[name]} in the environment is no number; `unset {name}`, or {HELP}")
    there = [name for name in PARTS if name in environ]
    missing = [name for name in PARTS if name not in environ]
    ranked = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environ]
    alone = there == ["WORLD_SIZE"] and environ["WORLD_SIZE"] == "1" and "LOCAL_RANK" not in environ
    if ranked and missing and not alone:
        given = ", ".join(f"{name}={environ[name]}" for name in ranked)
        raise UserError(
            f"{given} in the environment without {', '.join(missing)} is half a launch; `unset {' '.join(ranked)}`, "
            f"or {HELP}"
        )
    if several and not there:
        for name in MPI:
            if environ.get(name, "1") not in ("", "1"):
                raise UserError(
                    f"{name}={environ[name]}: started several times without RANK and WORLD_SIZE, so every process "
                    f"would train a run of its own; {HELP}"
                )


@dataclass(frozen=True)
class Process:
    """A process by its id and the time that it began at, since ids are used again."""

    pid: int
    began: float

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """None where there is no such process."""
        with suppress(psutil.NoSuchProcess):
            return cls(pid, psutil.Process(pid).create_time())
        return None

    @classmethod
    def named(cls, words: str) -> Process:
        pid, _, began = words.partition("@")
        return cls(int(pid), float(began))

    def __str__(self) -> str:
        return f"{self.pid}@{self.began}"

    @property
    def alive(self) -> bool:
        try:
            there = psutil.Process(self.pid)
            return abs(there.create_time() - self.began) < 0.1 and there.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True)
class Launcher:
    """Who started this process and waits for it: a sweep, torchrun, both or none.

    parent: the process id of torchrun. A user's own shell may end, and its background jobs go on.
    """

    sweep: Process | None
    parent: int | None

    @classmethod
    def found(cls, environ: Mapping[str, str] = os.environ) -> Launcher:
        sweep = Process.named(environ[SWEEP]) if SWEEP in environ else None
        return cls(sweep, nai_xl.PARENT if "TORCHELASTIC_RUN_ID" in environ else None)

    def __bool__(self) -> bool:
        return self.sweep is not None or self.parent is not None

    def gone(self) -> str | None:
        """Who has ended, in words; None while all are there."""
        if self.parent is not None and os.getppid() != self.parent:
            return f"torchrun (pid {self.parent}) has ended"
        if self.sweep is not None and not self.sweep.alive:
            return f"the sweep (pid {self.sweep.pid}) has ended"
        return None


def stopped_before(written: float | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a signal has stopped the run under this very torchrun, which is making a restart.

    written: the time at which the run's last stop was recorded, in seconds since the epoch.
    """
    agent = Process.of(nai_xl.PARENT) if "TORCHELASTIC_RUN_ID" in environ else None
    return agent is not None and written is not None and written > agent.began


def remarks(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What to say of a launch that is whole and yet not as it should be, a line each."""
    restarts = environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return [
            f"--max-restarts={restarts}: restarts would find the addresses of processes that have ended; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        ]
    return []
