"""How many images a run takes a step, and in which chunks, as its newest checkpoint says it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from nai_xl.errors import UserError
from nai_xl.record.run_dir import RunDirectory

NOTED = re.compile(r'"images_per_step",\s*\{"value":\s*(\d+)\}\],\s*\["chunk",\s*\{"value":\s*(\d+)\}')


class Pace(NamedTuple):
    """What counts of run.batch_size, run.grad_accum, run.chunk and the number of processes: images of one optimizer
    step on all processes together, and consecutive images that share a bucket.
    """

    images_per_step: int
    chunk: int

    def refuse_other(self, began: Pace | None, wide: int) -> None:
        """Raises UserError for a run that began at another pace: it would skip or repeat images. wide: images of a
        micro-batch on all processes.
        """
        if began is None or began == self:
            return
        accum, rest = divmod(began.images_per_step, wide)
        steps = f"run.grad_accum={accum}" if accum and not rest else "another run.batch_size or number of processes"
        raise UserError(
            f"this run began with {began.images_per_step} images a step in chunks of {began.chunk}, now it would have "
            f"{self.images_per_step} in chunks of {self.chunk}. {steps} and run.chunk={began.chunk} continue it; "
            "name=NAME begins a new run"
        )


def pace_of(run_dir: Path) -> Pace | None:
    """The pace of the newest checkpoint that says it; None where there is none."""
    for state in sorted(RunDirectory(run_dir).checkpoints.glob("step_*/state.json"), reverse=True):
        if state.parent.suffix:  # not whole yet, or damaged
            continue
        try:
            found = NOTED.search(state.read_text(encoding="utf-8", errors="replace"))
        except OSError:  # removed meanwhile
            continue
        if found:
            return Pace(int(found[1]), int(found[2]))
    return None
