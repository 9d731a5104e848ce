"""arm.json: what became of a run and, where it is an arm of a sweep, of which. Written under the run's lock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from nai_xl.errors import UserError, with_kind
from nai_xl.files import write_atomically
from nai_xl.record.run_dir import RunDirectory

Status = Literal["RUNNING", "FINISHED", "FAILED", "STOPPED"]


@dataclass(frozen=True)
class Arm:
    """The content of arm.json. `arm` holds the swept keys' values without the seed, {} outside of a sweep.

    `sweeps`: every sweep that the run has been an arm of, name -> its `arm` there; `sweep` is the last of them.
    `seconds` adds up over interruptions; `steps` and `images` count from the run's beginning. `epochs` is run.epochs,
    where that says how long to train.
    """

    sweep: str | None
    arm: Mapping[str, Any]
    seed: int
    signature: str
    status: Status = "RUNNING"
    error: str | None = None
    seconds: float = 0.0
    steps: int = 0
    images: int = 0
    epochs: float | None = None
    sweeps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return label(self.arm)

    def finished(self, *, max_images: int | None, epochs: float | None) -> bool:
        """Whether this run has been trained as long as asked for."""
        if self.status != "FINISHED":
            return False
        return self.images >= max_images if max_images is not None else (self.epochs or 0) >= (epochs or 0)


def label(arm: Mapping[str, Any]) -> str:
    """'schedule=ztsnr,loss=minsnr'; a number that a search drew in six digits."""
    return ",".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in arm.items()
    )


def read_arm(run_dir: Path) -> Arm | None:
    """What the run's arm.json says; None where there is none."""
    try:
        content = json.loads((run_dir / "arm.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    known = {field.name for field in fields(Arm)}
    return Arm(**{key: value for key, value in content.items() if key in known})


def write_arm(run_dir: Path, arm: Arm) -> None:
    """Write arm.json in one piece. Memberships of other sweeps that it records are kept."""
    before = read_arm(run_dir)
    here = {arm.sweep: dict(arm.arm)} if arm.sweep else {}
    arm = replace(arm, sweeps={**(before.sweeps if before else {}), **here})
    text = json.dumps(asdict(arm), indent=2, default=str)
    write_atomically(run_dir / "arm.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))


class ArmNote:
    """Keeps arm.json up while a run goes on, on its first process. A context manager around everything the run does.

    What another process is training is left alone, and so is a folder that cannot be written. A run outside of any
    sweep that fails before training leaves no trace.
    """

    def __init__(self, home: RunDirectory, arm: Arm):
        self.home = home
        before = read_arm(home.path)
        self.arm = replace(arm, seconds=before.seconds, steps=before.steps, images=before.images) if before else arm
        self.began: float | None = None
        self.first = os.environ.get("RANK", "0") == "0"

    def begin(self) -> None:
        """Training begins or goes on. The caller holds the run's lock."""
        self.began = time.monotonic()
        write_arm(self.home.path, replace(self.arm, status="RUNNING", error=None))

    def reached(self, step: int, images_per_step: int) -> None:
        """How far the run is; written with its next status."""
        self.arm = replace(self.arm, steps=step, images=step * images_per_step)

    def __enter__(self) -> ArmNote:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.first and (kind is None or self.began is not None or self.arm.sweep is not None):
            stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
            status: Status = "FINISHED" if kind is None else "STOPPED" if stopped else "FAILED"
            self.end(status, None if error is None or stopped else with_kind(error))

    def adopt(self, found: Arm) -> None:
        """Make a run that another sweep, or none, has trained an arm of this one too."""
        if self.arm.sweep is not None and (found.sweep, found.arm) != (self.arm.sweep, self.arm.arm):
            self._write(replace(found, sweep=self.arm.sweep, arm=self.arm.arm))

    def end(self, status: Status, error: str | None = None) -> None:
        """Record what became of the run, unless another process has it in hand."""
        seconds = self.arm.seconds + (time.monotonic() - self.began if self.began is not None else 0)
        self._write(replace(self.arm, status=status, error=error, seconds=round(seconds, 1)))

    def _write(self, arm: Arm) -> None:
        with suppress(UserError):
            self.home.create()
            with self.home.lock():
                write_arm(self.home.path, arm)


# --- what a run has measured ------------------------------------------------------------------------------------------


def last_value(run_dir: Path, name: str) -> float | None:
    """The newest value of a metric in metrics.jsonl; None where there is none."""
    return next((float(row[name]) for row in reversed(_rows(run_dir)) if name in row), None)


def last_step(run_dir: Path) -> int:
    """The last optimizer step that metrics.jsonl tells of; 0 where there is none."""
    return max((int(row["step"]) for row in _rows(run_dir)), default=0)


def objective(run_dir: Path) -> float | None:
    """What a search minimises: the last val/loss, or train/loss where nothing is validated."""
    validated = last_value(run_dir, "val/loss")
    return last_value(run_dir, "train/loss") if validated is None else validated


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, less a line cut short by a crash."""
    rows = []
    with suppress(FileNotFoundError):
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows
