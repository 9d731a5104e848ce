"""Going back to the newest checkpoint: at the start of a run, and after a step that was not finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nai_xl.config.spec import Spec
from nai_xl.distributed import activity
from nai_xl.engine.assemble import State
from nai_xl.engine.checkpoint import PaceState
from nai_xl.engine.console import Screen
from nai_xl.engine.nonfinite import Guard
from nai_xl.interfaces import Checkpointer, Stateful
from nai_xl.record.journal import now, outbox_of
from nai_xl.record.progress import ProgressRecord
from nai_xl.record.run_dir import RunDirectory
from nai_xl.task.task import TrainingData


@dataclass
class Restoring:
    """Takes a run up where it was saved. Every rank makes and calls it."""

    spec: Spec
    home: RunDirectory
    screen: Screen
    progress: ProgressRecord
    pace: PaceState
    checkpoints: Checkpointer
    state: State
    data: TrainingData

    def __post_init__(self) -> None:
        state = self.state.stateful()
        self.parts: dict[str, Stateful] = {"pace": self.pace, **self.spec.task.stateful(), **state}

    def begin(self) -> tuple[int, Mapping[str, float] | None]:
        """Load the newest checkpoint: its step, and what this step has still to report, None if nothing."""
        self.state.meter.on_fault = self._guard()
        self.checkpoints.bind(**self.parts)
        start = self.checkpoints.load_latest()
        self.screen.say(*self.checkpoints.remarks)
        if start == 0 or self.progress.read() is None:
            self.progress.begin(start if self.checkpoints.unreported is None else 0)
        # as the first rank finds it
        reported = self.state.strategy.gather_objects([self.progress.has_reported(start)])[0]
        return start, None if reported else self.checkpoints.unreported

    def _guard(self) -> Guard:
        run = self.spec.run
        return Guard(
            policy=run.on_nonfinite,
            limit=run.max_nonfinite,
            state=self.state,
            trace=lambda sample: self.spec.task.traced(self.data, sample, run.seed),
            autocast=self.spec.precision.autocast,
            say=self.screen.say,
            note=self._note,
            go_back=self._go_back,
        )

    def _go_back(self) -> int:
        """Everything but the meter, which knows what has been left out, as at the newest checkpoint; its step."""
        activity.doing("going back to the newest checkpoint")
        self.checkpoints.finish()
        said = len(self.checkpoints.remarks)
        self.checkpoints.bind(**{name: part for name, part in self.parts.items() if name != "meter"})
        step = self.checkpoints.load_latest()
        self.checkpoints.bind(**self.parts)
        self.screen.say(*self.checkpoints.remarks[said:])
        return step

    def _note(self, **row: Any) -> None:
        """Keep in the run's record what was left out, once however often the run was continued."""
        outbox = outbox_of(self.home.path)
        known = (r for r in outbox.rows() if r["kind"] == "nonfinite")
        if self.state.strategy.first and not any(r["steps"] == row["steps"] for r in known):
            outbox.append(time=now(), kind="nonfinite", **row)
