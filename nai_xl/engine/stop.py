"""The orderly end of a run: a signal asks for it, and the run saves what it has and exits with status 75."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from nai_xl.distributed import activity
from nai_xl.distributed.launch import SIGNALS
from nai_xl.distributed.strategy import Strategy
from nai_xl.errors import Stopped


class Stop:
    """Inside the block each of SIGNALS asks for an orderly end; a second SIGINT raises KeyboardInterrupt at once.

    The signal raises Stopped at once, wherever the program is: files are written whole or not at all. Inside `deferred`
    it only sets `asked`, and the work ends by itself when nothing is half done. A sweep is deferred from the beginning.

    A SIGHUP that is ignored when the block begins, as under nohup, stays ignored. SIGUSR2 counts where somebody handles
    it already, as submitit does to put the job back into the queue; that handler is called when the run has saved.
    """

    def __init__(self, *, deferred: bool = False) -> None:
        self.asked = False
        self.by: int | None = None  # the first signal
        self.later = deferred
        self.answer: Callable[[], bool] | None = None

    def __enter__(self) -> Stop:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        taken = [number for number in SIGNALS if not (number == signal.SIGHUP and ignored)]
        if callable(signal.getsignal(signal.SIGUSR2)):
            taken.append(signal.SIGUSR2)
        self.before = {number: signal.signal(number, self._ask) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        queue_again: Any = self.before.get(signal.SIGUSR2)
        if self.by == signal.SIGUSR2 and queue_again:
            queue_again(self.by, None)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.by = True, number
            if not self.later:
                raise Stopped

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block a signal only sets `asked`."""
        before, self.later = self.later, True
        try:
            yield
        finally:
            self.later = before

    @contextmanager
    def then_quiet(self) -> Iterator[None]:
        """After the block signals are only noted, however it ends: what follows are last words."""
        try:
            yield
        finally:
            self.later = True

    def due(self, strategy: Strategy) -> bool:
        """Whether to end here. All ranks call it before each step, and all get the same answer.

        Several ranks ask each other when a step begins and read the answer when it has ended, so none waits.
        """
        if strategy.world == 1:
            return self.asked
        answer, self.answer = self.answer, None
        if answer and answer():
            return True
        self.answer = strategy.ask(self.asked)
        return False

    @contextmanager
    def between_passes(self, module: nn.Module, strategy: Strategy) -> Iterator[None]:
        """Inside the block a forward pass of `module` raises Stopped once an end was asked for.

        Where every rank evaluates, they run the same passes: they ask each other at each, and leave together.
        """

        def before_pass(*_: object) -> None:
            activity.beat()
            if strategy.ask(self.asked)() if strategy.lockstep else self.asked:
                raise Stopped

        hook = module.register_forward_pre_hook(before_pass)
        try:
            yield
        finally:
            hook.remove()
