"""Batches on the device, one ahead of the one in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from nai_xl.types import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Every batch on `device`. On a GPU the next one is copied on a stream of its own while this one is computed on."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    read, copying = iter(batches), torch.cuda.Stream(device)

    def copy_next() -> Batch | None:
        batch = next(read, None)
        with torch.cuda.stream(copying):
            return batch.to(device) if batch else None

    ahead = copy_next()
    while ahead:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        ahead.record_stream(computing)
        ready, ahead = ahead, copy_next()
        yield ready
