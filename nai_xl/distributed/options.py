"""How a run spreads over processes: one, or data-parallel copies started by torchrun or accelerate launch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import KwargsHandler

from nai_xl.errors import UserError
from nai_xl.interfaces import Precision


@dataclass(frozen=True)
class SingleProcess:
    """One process on one device."""

    several: ClassVar[bool] = False  # whether a run can have more than one process

    def accelerator(self, precision: Precision) -> Accelerator:
        """Raises UserError inside a multi-process launch, where every process would train a model of its own."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("started on several processes with distributed=none; set distributed=ddp")
        # accelerate keeps its first configuration for the life of the process and refuses another precision
        AcceleratorState._reset_state(reset_partial_state=True)
        return _accelerator(precision)


@dataclass(frozen=True)
class DataParallel:
    """torch's DistributedDataParallel: a copy of the model per process, gradients averaged over all."""

    several: ClassVar[bool] = True

    def accelerator(self, precision: Precision) -> Accelerator:
        # buffers are constants here, and views spare a copy of all gradients
        handler = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        # one rank may encode or save for long while the others wait; the default would end the run after 10 minutes
        return _accelerator(precision, handler, InitProcessGroupKwargs(timeout=timedelta(hours=6)))


def _accelerator(precision: Precision, *handlers: KwargsHandler) -> Accelerator:
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision=fp16 needs a GPU; use bf16 or no on a CPU")
    return Accelerator(
        mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=list(handlers) or None
    )
