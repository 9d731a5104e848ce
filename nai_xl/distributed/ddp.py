"""distributed=ddp: a copy of the model in each process; start it with torchrun or accelerate launch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs

from nai_xl.distributed.start import accelerator
from nai_xl.distributed.strategy import DataParallel, Engine, Strategy
from nai_xl.interfaces import Precision


@dataclass(frozen=True)
class Ddp(Engine):
    """torch's DistributedDataParallel: a copy of the model per process, gradients averaged over all."""

    several: ClassVar[bool] = True

    def start(self, precision: Precision) -> Strategy:
        # buffers are constants here, and views spare a copy of all gradients
        handler = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        # one rank may encode or save for long while the others wait; the default would end the run after 10 minutes
        return DataParallel(accelerator(precision, handler, InitProcessGroupKwargs(timeout=timedelta(hours=6))))
