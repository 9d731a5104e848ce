"""A process group of one, for engines that need a group where no launcher has made one."""

from __future__ import annotations

from torch import distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]

from nai_xl.memory import process_wide


def process_group(device: str) -> None:
    """Join a group of this process alone, until the end of the run, unless there is a group already.

    device: "cuda" or "cpu".
    """
    if not distributed.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        process_wide.afterwards(distributed.destroy_process_group)
