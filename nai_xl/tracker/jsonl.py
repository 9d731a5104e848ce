"""Where a run's numbers and pictures go. Every tracker keeps the record in the run directory: metrics.jsonl and
outbox.jsonl (record.journal), params.json, and the pictures themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from nai_xl.errors import with_kind
from nai_xl.files import write_atomically, writing
from nai_xl.record.config import write_params
from nai_xl.record.journal import metrics_of, note_end, now, outbox_of
from nai_xl.record.metrics import last_step
from nai_xl.record.run_dir import RunDirectory
from nai_xl.tracker.sweep import SweepTracker


class NoTracker:
    """Reports nothing: for every rank but the first, and the base of the other trackers."""

    @classmethod
    def of_sweep(cls, **settings: Any) -> SweepTracker:
        """What follows a whole sweep whose arms have this tracker with these `settings` of its config node."""
        return SweepTracker()

    def __enter__(self) -> NoTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        pass

    def params(self, flat: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        pass

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def figure(self, name: str, step: int, image: Image.Image) -> None:
        pass

    def artifact(self, path: Path) -> None:
        pass

    def where(self) -> list[str]:
        """Lines that tell a person where to look for the run's results."""
        return []


class JsonlTracker(NoTracker):
    """Keeps the record of a run in `run_dir`, each step once however often the run was resumed.

    Pictures lie in `run_dir`/<name>/step_00000100.png.
    """

    changes_weights: ClassVar[bool] = False

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.metrics, self.outbox = metrics_of(run_dir), outbox_of(run_dir)
        self.metrics.mend()
        self.outbox.mend()
        self.last = last_step(run_dir)
        self.figures = {(row["name"], row["step"]) for row in self.outbox.rows() if row["kind"] == "figure"}

    def __enter__(self) -> JsonlTracker:
        self.outbox.append(time=now(), kind="status", status="RUNNING", error="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        told = with_kind(error) if error is not None and status == "FAILED" else ""
        note_end(self.run_dir, status, told)

    def params(self, flat: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        write_params(self.run_dir, flat, tags)
        self.outbox.append(time=now(), kind="tags", tags=dict(tags))
        self.outbox.append(time=now(), kind="params", file=RunDirectory(self.run_dir).params.name)

    def is_new(self, step: int) -> bool:
        """False for a step that this run has reported already, before it was resumed."""
        return step > self.last

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.is_new(step):
            self.metrics.append(step=step, time=now(), **values)

    def figure(self, name: str, step: int, image: Image.Image) -> None:
        path = self.run_dir / name / f"step_{step:08d}.png"
        with writing(path):
            write_atomically(path, lambda aside: image.save(aside, format="PNG"))
        if (name, step) not in self.figures:
            self.figures.add((name, step))
            self.outbox.append(time=now(), kind="figure", name=name, step=step, file=f"{name}/{path.name}")

    def artifact(self, path: Path) -> None:
        inside = path.absolute().is_relative_to(self.run_dir.absolute())
        place = path.absolute().relative_to(self.run_dir.absolute()) if inside else path.absolute()
        self.outbox.append(time=now(), kind="artifact", file=place.as_posix())

    def where(self) -> list[str]:
        return [f"metrics      {self.metrics.path}"]
