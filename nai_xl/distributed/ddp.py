"""distributed=ddp: a copy of the model in each process; start it with torchrun or accelerate launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accelerate import DistributedDataParallelKwargs

from nai_xl.distributed.start import joined
from nai_xl.distributed.strategy import TIMEOUT, DataParallel, Engine, Minutes, Strategy
from nai_xl.interfaces import Precision


@dataclass(frozen=True)
class Ddp(Engine):
    """torch's DistributedDataParallel: a copy of the model per process, gradients averaged over all.

    timeout: minutes that a process may be silent, or all of them without progress, until the run ends.
    """

    several: ClassVar[bool] = True

    timeout: Minutes = TIMEOUT

    def start(self, precision: Precision) -> Strategy:
        # buffers are constants here, and views spare a copy of all gradients
        handler = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        return DataParallel(joined(precision, self.timeout, handler))
