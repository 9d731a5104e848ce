"""Batches on the device, copied beside the computation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from nai_xl.errors import UserError
from nai_xl.interfaces import MicroBatch


def on_device(batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Every batch on `device`. On a GPU it is copied on a stream of its own.

    The host never waits in a step, so it asks for a batch while the device still computes on those before it, and the
    copy runs beside that. Raises UserError in the words of whoever raised it, a loader's worker too.
    """
    batches = _in_its_own_words(batches)
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        moved.record_stream(computing)
        yield moved


def _in_its_own_words(batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """torch gives a worker's error the worker's traceback as its message; the last line is the error itself."""
    try:
        yield from batches
    except UserError as error:
        *traceback, last = str(error).strip().splitlines()
        raise UserError(last.partition(": ")[2] if traceback else last) from error
