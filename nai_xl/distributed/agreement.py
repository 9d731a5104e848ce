"""Whether any rank has a flag set, asked at one moment and read at a later one, without waiting for a device."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed

FOREVER = timedelta(days=30)  # of a process group: the heartbeat decides when a rank has been silent for too long


class Agreement:
    """A process group of its own on the CPU. Every rank makes one, and calls `ask` as often as the others do."""

    def __init__(self) -> None:
        self.group = distributed.new_group(backend="gloo", timeout=FOREVER)

    def ask(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask all ranks; the function returned has the answer, and waits for it if it must."""
        flags = torch.tensor([int(flag)])
        work = distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=self.group, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(flags.item())

        return answer
