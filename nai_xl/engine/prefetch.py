"""Batches on the device, copied beside the computation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from nai_xl.interfaces import MicroBatch


def on_device(batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Every batch on `device`. On a GPU it is copied on a stream of its own.

    The host never waits in a step, so it asks for a batch while the device still computes on those before it, and the
    copy runs beside that.
    """
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
