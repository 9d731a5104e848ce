"""progress.json: up to which step a run has been evaluated and reported, and which step it has delivered.

With the checkpoints it tells where a run that was killed goes on: with a step's evaluation and report, or after them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from pydantic import TypeAdapter

from nai_xl.files import writing
from nai_xl.record.json_file import Damaged, read_json, write_json
from nai_xl.record.run_dir import RunDirectory


@dataclass(frozen=True)
class Progress:
    """The content of progress.json: the last steps of which it is true. It is noted for steps with a checkpoint."""

    reported: int = 0
    delivered: int = 0


_PROGRESS = TypeAdapter(Progress)


class ProgressRecord:
    """Reads and, where this process `writes`, keeps progress.json."""

    def __init__(self, home: RunDirectory, *, writes: bool):
        self.home, self.writes = home, writes

    def read(self) -> Progress | None:
        """None where there is none: nothing is saved yet, or version 0.1 has trained the run.

        A damaged one says that nothing was reported. To report and deliver again does no harm.
        """
        try:
            return read_json(self.home.progress, _PROGRESS, "it is written anew")
        except Damaged:
            return Progress()

    def begin(self, reported: int) -> None:
        """Nothing is delivered; up to step `reported` nothing is left to report."""
        self._write(Progress(reported))

    def reported(self, step: int) -> None:
        before = self.read() or Progress()
        if before.reported < step:
            self._write(replace(before, reported=step))

    def delivered(self, step: int) -> None:
        self._write(replace(self.read() or Progress(), delivered=step))

    def has_reported(self, step: int) -> bool:
        """Whether nothing is left to report of `step`."""
        found = self.read()
        return found is not None and found.reported >= step

    def has_delivered(self, step: int) -> bool:
        """Whether the pipeline there is that of `step` or of a later one."""
        found = self.read()
        return self.home.pipeline.is_dir() and (found is None or min(found.reported, found.delivered) >= step)

    def _write(self, progress: Progress) -> None:
        if self.writes:
            with writing(self.home.progress):
                write_json(self.home.progress, asdict(progress))
