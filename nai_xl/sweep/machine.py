"""What this machine has for the arms of a sweep, and how it is shared out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch


def visible_gpus() -> list[str]:
    """The names of this process's GPUs, as CUDA_VISIBLE_DEVICES lists them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def slots(parallel: int, processes: int, gpus: Sequence[str], cores: int) -> list[dict[str, str]]:
    """What each of the `parallel` slots adds to the environment of its arm: GPUs, and a share of the cores.

    Several arms share a GPU where there are fewer GPUs than arms at a time. OMP_NUM_THREADS is left as it is where it
    is set already, and where a single process has the whole machine.
    """
    added: dict[str, str] = {"PYTHONUNBUFFERED": "1"}
    if parallel * processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = str(max(1, cores // (parallel * processes)))
    places = []
    for number in range(parallel):
        own = [gpus[(number * processes + i) % len(gpus)] for i in range(processes)] if gpus else []
        places.append(added | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if gpus else {}))
    return places
