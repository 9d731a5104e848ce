"""What a run's identity holds of batch_size, grad_accum, chunk and the number of processes: images a step, and chunk.

On one process a micro-batch of a whole chunk takes the same images: that is how the signature describes every split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nai_xl.record.pace import Pace, pace_of

SPLIT = ("batch_size", "grad_accum", "chunk")  # the settings of `run`


def pace_in(run: Mapping[str, Any], world: int) -> Pace | None:
    """The pace of these settings of `run` on so many processes; None where they are no numbers, which is refused."""
    batch, accum, chunk = run.get("batch_size"), run.get("grad_accum", 1), run.get("chunk") or 0
    if not all(type(value) is int for value in (batch, accum, chunk)) or not (batch and accum):
        return None
    return Pace(batch * accum * world, chunk or batch * world)


def as_one_process(run: Mapping[str, Any], pace: Pace | None) -> dict[str, Any]:
    """The settings of `run` with the split that a single process would have at this pace."""
    if pace is None:
        return dict(run)
    rest = {key: value for key, value in run.items() if key not in SPLIT}
    accum, uneven = divmod(pace.images_per_step, pace.chunk)
    if uneven or not accum:
        return {**rest, "batch_size": pace.images_per_step, "chunk": pace.chunk}
    return {**rest, "batch_size": pace.chunk, "grad_accum": accum}


def misplaced(run_dir: Path) -> Pace | None:
    """The pace of a run that an earlier version put where its batch_size, grad_accum and chunk said, and not its pace;
    None for others. Of its config.yaml three numbers are read, without parsing it.
    """
    pace = pace_of(run_dir)
    try:
        text = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    batch, accum, chunk = (re.search(rf"^  {key}: (\w+)$", text, re.MULTILINE) for key in SPLIT)
    if pace is None or batch is None or not batch[1].isdecimal():
        return None
    split = int(batch[1]), int(accum[1]) if accum and accum[1].isdecimal() else 1
    plain = chunk is None or chunk[1] == "null"
    return None if plain and pace == Pace(split[0] * split[1], split[0]) else pace
