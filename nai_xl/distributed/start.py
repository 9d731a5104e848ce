"""accelerate's process group, as every option of the group `distributed` begins it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import KwargsHandler

from nai_xl.distributed.agreement import FOREVER
from nai_xl.errors import UserError
from nai_xl.interfaces import Precision


def accelerator(precision: Precision, *handlers: KwargsHandler) -> Accelerator:
    """Raises UserError for fp16 without a GPU, whose loss scaler a CPU lacks."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision=fp16 needs a GPU; use precision=bf16 or precision=fp32 on a CPU")
    # accelerate keeps its first configuration for the life of the process and refuses another precision
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=list(handlers) or None
    )


def joined(precision: Precision, minutes: float, *handlers: KwargsHandler) -> Accelerator:
    """The same, of several processes. Ends this one when the others have not come within `minutes`.

    Its collectives wait as long as it takes: the heartbeat knows which of the others are alive.
    """
    with joining(minutes):
        return accelerator(precision, *handlers, InitProcessGroupKwargs(timeout=FOREVER))


@contextmanager
def joining(minutes: float) -> Iterator[None]:
    """Around what waits for the other processes and names none of them."""

    def give_up() -> None:
        environ = os.environ
        address = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"
        print(
            f"error: rank {environ.get('RANK')} has waited {minutes:g} minutes at {address} for the other processes, "
            f"{environ.get('WORLD_SIZE')} in all (distributed.timeout={minutes:g})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(minutes * 60, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
