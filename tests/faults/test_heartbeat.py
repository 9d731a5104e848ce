"""A rank that is dead, frozen or stuck ends the job with a message that names it, on ranks that are real processes."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from nai_xl.distributed import activity
from nai_xl.distributed.heartbeat import Heartbeat
from nai_xl.distributed.launch import Launcher
from nai_xl.engine.stop import Stop
from nai_xl.errors import Stopped, UserError

SECONDS = 3.0  # of the timeout
FORK = multiprocessing.get_context("fork")  # torch is imported already
Scenario = Callable[["Ranks", Stop], None]


class Ranks:
    """What a heartbeat asks of a strategy, over gloo."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.first, self.whole = rank, world, rank == 0, True

    def gather_objects(self, rows: list[Any]) -> list[Any]:
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, rows)
        return [one for rows in found for one in rows]

    def wait(self) -> None:
        with activity.waiting():
            distributed.barrier()


def lived(rank: int, world: int, port: int, folder: Path, scenario: Scenario) -> None:
    """The life of one rank, as nai_xl.train has it: its output in a file, and its end as an exit status."""
    out = (folder / f"{rank}.txt").open("w", buffering=1)
    os.dup2(out.fileno(), 2)
    sys.stderr = out
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(days=1))
    ranks = Ranks(rank, world)
    record = (folder / "record.txt").write_text
    status = 0
    try:
        with Stop() as stop:
            beat = Heartbeat(ranks, SECONDS / 60, lambda error: record(str(error)), Launcher(None, None))  # type: ignore
            with beat, stop.then_quiet():
                scenario(ranks, stop)
    except Stopped:
        status = 75
    except KeyboardInterrupt:
        status = 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    os._exit(status)


class Job:
    """Ranks under way; `ended` waits for them."""

    def __init__(self, scenario: Scenario, folder: Path, world: int = 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = [(rank, world, port, folder, scenario) for rank in range(world)]
        self.folder = folder
        self.ranks = [FORK.Process(target=lived, args=one, daemon=True) for one in arguments]
        for rank in self.ranks:
            rank.start()

    def wait_for(self, name: str) -> None:
        until = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < until, self.said(0) + self.said(1)
            time.sleep(0.05)

    def send(self, rank: int, number: int) -> None:
        os.kill(self.ranks[rank].pid or 0, number)

    def ended(self) -> list[int | None]:
        for rank in self.ranks:
            rank.join(60)
        statuses = [rank.exitcode for rank in self.ranks]
        for rank in self.ranks:
            rank.kill()
        return statuses

    def said(self, rank: int) -> str:
        return (self.folder / f"{rank}.txt").read_text()

    def named(self, rank: int, teller: int) -> bool:
        return f"error: rank {rank} ({socket.gethostname()}, pid {self.ranks[rank].pid})" in self.said(teller)


@pytest.fixture
def job(tmp_path: Path) -> Callable[[Scenario], Job]:
    return lambda scenario: Job(scenario, tmp_path)


def lockstep(folder: Path) -> Scenario:
    """Steps that all ranks take together."""

    def scenario(ranks: Ranks, stop: Stop) -> None:
        with stop.deferred():
            for step in range(10**6):
                activity.doing(f"training step {step}", lockstep=True)
                distributed.all_reduce(torch.ones(1))
                time.sleep(0.01)
                if step == 60:  # told to the other ranks by now
                    (folder / "begun").touch()

    return scenario


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_ends_the_job(job: Callable[[Scenario], Job], tmp_path: Path, frozen: int) -> None:
    running = job(lockstep(tmp_path))
    running.wait_for("begun")
    running.send(frozen, signal.SIGSTOP)
    other = 1 - frozen
    statuses = running.ended()
    assert (statuses[frozen], statuses[other]) == (-signal.SIGKILL, 1)
    told = running.said(other)
    assert running.named(frozen, other) and "has not answered for 0.05 minutes, it was: training step" in told
    if other == 0:
        assert (tmp_path / "record.txt").read_text() in told


def test_a_dead_rank_is_told_from_the_error_of_the_collective_that_missed_it(
    job: Callable[[Scenario], Job], tmp_path: Path
) -> None:
    running = job(lockstep(tmp_path))
    running.wait_for("begun")
    running.send(1, signal.SIGKILL)
    assert running.ended() == [1, -signal.SIGKILL]
    assert running.named(1, teller=0) and "has died; it was: training step" in running.said(0)
    assert "Traceback" not in running.said(0)


def test_a_rank_that_is_stuck_is_named_and_not_the_one_that_waits_for_it(
    job: Callable[[Scenario], Job], tmp_path: Path
) -> None:
    def scenario(ranks: Ranks, stop: Stop) -> None:
        activity.doing("reading a file that never comes")
        if ranks.rank == 1:
            time.sleep(1000)
        ranks.wait()

    running = job(scenario)
    assert running.ended() == [1, 1]
    tellers = [teller for teller in (0, 1) if running.named(1, teller)]  # the second may only see the end of the first
    assert tellers
    for teller in tellers:
        assert "has not made progress for 0.05 minutes, it was: reading a file" in running.said(teller)


def test_a_rank_that_works_for_long_is_waited_for(job: Callable[[Scenario], Job], tmp_path: Path) -> None:
    """As one that encodes, or that saves, for longer than the timeout."""

    def scenario(ranks: Ranks, stop: Stop) -> None:
        activity.doing("encoding")
        until = time.monotonic() + 2 * SECONDS
        while ranks.first and time.monotonic() < until:
            torch.ones(500, 500) @ torch.ones(500, 500)
        ranks.wait()

    assert job(scenario).ended() == [0, 0]


def test_the_error_of_one_rank_is_told_on_the_others(job: Callable[[Scenario], Job], tmp_path: Path) -> None:
    def scenario(ranks: Ranks, stop: Stop) -> None:
        if ranks.rank == 1:
            raise UserError("the disk is full")
        ranks.wait()

    running = job(scenario)
    assert running.ended() == [1, 1]
    assert running.named(1, teller=0) and "failed: the disk is full" in running.said(0)


def test_a_signal_to_one_rank_reaches_one_that_waits_inside_a_collective(
    job: Callable[[Scenario], Job], tmp_path: Path
) -> None:
    """Rank 1 waits inside a barrier, where no handler of Python's runs, for rank 0, which does something else."""

    def scenario(ranks: Ranks, stop: Stop) -> None:
        (tmp_path / "begun").touch()
        while ranks.first:
            activity.beat()
            time.sleep(0.05)
        ranks.wait()

    running = job(scenario)
    running.wait_for("begun")
    running.send(1, signal.SIGUSR1)
    assert running.ended() == [75, 75]
