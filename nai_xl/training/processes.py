"""A run among other processes: its own ranks, the launcher that started it, and another that trains it still."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from nai_xl.config.spec import Spec
from nai_xl.distributed import activity
from nai_xl.distributed.heartbeat import Heartbeat
from nai_xl.distributed.launch import SWEEP, stopped_before
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.stop import Stop
from nai_xl.errors import Stopped
from nai_xl.record.run_dir import RunDirectory

PATIENCE = 300.0  # seconds in which an arm that a killed sweep has left behind can save its state


@contextmanager
def heartbeat(spec: Spec, strategy: Strategy, stop: Stop, record: Callable[[str | None], None]) -> Iterator[None]:
    """Around all that a run does with `strategy`. record: see Heartbeat."""
    activity.doing("reading the index of the images")
    with Heartbeat(strategy, spec.distributed.timeout, record), stop.then_quiet():
        yield


def decline_restart(stopped_at: float | None) -> None:
    """Raises Stopped where torchrun restarts a run that a signal has stopped. stopped_at: when, in seconds of time.

    torchrun takes every status but 0 for a failure, and begins anew as often as --max-restarts says.
    """
    if stopped_before(stopped_at):
        print("a signal stopped this run: torchrun does not restart it, and the same command goes on", file=sys.stderr)
        raise Stopped(together=True)


@contextmanager
def held(home: RunDirectory) -> Iterator[None]:
    """Hold the run's lock. An arm waits for a process that a killed sweep has left behind and that is saving still.

    Raises UserError when another process holds it.
    """
    with ExitStack() as stack:
        with activity.held_up():
            stack.enter_context(home.locked(PATIENCE if SWEEP in os.environ else 0))
        yield
