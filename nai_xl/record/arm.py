"""arm.json: what became of a run, and which arm of which sweep it is. Written by whoever holds the run's lock."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from nai_xl.errors import UserError, with_kind
from nai_xl.record.json_file import Damaged, keep_aside, overwrite_json, read_json, write_json
from nai_xl.record.run_dir import RunDirectory

Status = Literal["RUNNING", "FINISHED", "FAILED", "STOPPED"]


@dataclass(frozen=True)
class Arm:
    """The content of arm.json. `arm` holds the values of the swept keys without the seed; {} outside of a sweep.

    sweeps: every sweep that the run has been an arm of, name -> its `arm` there; `sweep` is the last of them. place:
    its place among the runs of `sweep`, in the order that they were typed in; places: the last that it had in each
    sweep, since a command for some of the arms moves them forward.
    seconds: the time spent on training, over all interruptions. steps, images: counted from the run's beginning.
    epochs: run.epochs, where that says how long to train.
    kin: the signature without images a step and chunk; None where an earlier version wrote the file.
    """

    sweep: str | None = None
    arm: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    signature: str = ""
    status: Status = "RUNNING"
    error: str | None = None
    seconds: float = 0.0
    steps: int = 0
    images: int = 0
    epochs: float | None = None
    sweeps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    place: int | None = None
    places: Mapping[str, int] = field(default_factory=dict)
    kin: str | None = None

    @property
    def label(self) -> str:
        return label(self.arm)

    def finished(self, *, max_images: int | None, epochs: float | None) -> bool:
        """Whether this run has been trained as long as asked for."""
        if self.status != "FINISHED":
            return False
        return self.images >= max_images if max_images is not None else (self.epochs or 0) >= (epochs or 0)


def label(arm: Mapping[str, Any]) -> str:
    """'schedule=ztsnr,loss=minsnr'; floats, which a search may have drawn, have six digits."""
    return ",".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in arm.items()
    )


_ARM = TypeAdapter(Arm)


def read_arm(run_dir: Path) -> Arm | None:
    """The content of the run's arm.json; None where there is none. Keys that Arm does not have are left out.

    Raises Damaged.
    """
    return read_json(RunDirectory(run_dir).arm, _ARM, "train that run again, or remove the file")


def arm_so_far(run_dir: Path) -> Arm | None:
    """read_arm for whoever is about to write the file: a damaged one counts as missing, and is kept aside."""
    try:
        return read_arm(run_dir)
    except Damaged:
        _keep_aside(RunDirectory(run_dir).arm)
        return None


@functools.cache  # it is read several times before it is replaced
def _keep_aside(path: Path) -> None:
    keep_aside(path, "it is made anew without the time and steps so far")


def write_arm(run_dir: Path, arm: Arm) -> None:
    """Replace arm.json, whole; on a full disk it is overwritten in its place. Other sweeps that it names are kept."""
    before = arm_so_far(run_dir)
    here = {arm.sweep: dict(arm.arm)} if arm.sweep else {}
    places = dict(before.places if before else {})
    if arm.sweep and arm.place is not None:
        places[arm.sweep] = max(arm.place, places.get(arm.sweep, 0))
    arm = replace(arm, sweeps={**(before.sweeps if before else {}), **here}, places=places)
    path = RunDirectory(run_dir).arm
    try:
        write_json(path, asdict(arm))
    except OSError:
        overwrite_json(path, asdict(arm))


class ArmRecord:
    """Keeps arm.json up to date while a run goes on. A context manager around everything that the run does.

    Only the first process writes. It does not write while another process trains the run, nor where the directory
    cannot be written. A run outside of any sweep that fails before training leaves no trace.
    """

    def __init__(self, home: RunDirectory, arm: Arm):
        self.home = home
        before = arm_so_far(home.path)
        self.arm = replace(arm, seconds=before.seconds, steps=before.steps, images=before.images) if before else arm
        self.began: float | None = None
        self.only_seen = False
        self.first = os.environ.get("RANK", "0") == "0"

    def begin(self) -> None:
        """Training begins or goes on. The caller holds the run's lock."""
        self.began = time.monotonic()
        write_arm(self.home.path, replace(self.arm, status="RUNNING", error=None))

    def reached(self, step: int, images_per_step: int) -> None:
        """How far the run is; written with its next status."""
        self.arm = replace(self.arm, steps=step, images=step * images_per_step)

    def seen_finished(self, step: int, images_per_step: int) -> None:
        """The run was finished before, and nothing was done: its record stays as it is, if it says so."""
        found = arm_so_far(self.home.path)
        self.only_seen = found is not None and found.status == "FINISHED"
        if found and self.only_seen and self.first:
            self.adopt(found)
        self.reached(step, images_per_step)

    def __enter__(self) -> ArmRecord:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.only_seen:
            return
        if self.first and (kind is None or self.began is not None or self.arm.sweep is not None):
            stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
            status: Status = "FINISHED" if kind is None else "STOPPED" if stopped else "FAILED"
            self.end(status, None if error is None or stopped else with_kind(error))

    def adopt(self, found: Arm) -> None:
        """Make a run that another sweep, or none, has trained an arm of this sweep too."""
        mine = self.arm
        if mine.sweep is None:
            return
        later = mine.place is not None and mine.place > found.places.get(mine.sweep, -1)
        if later or (found.sweep, found.arm) != (mine.sweep, mine.arm):
            self._write(replace(found, sweep=mine.sweep, arm=mine.arm, place=mine.place))

    def end(self, status: Status, error: str | None = None) -> None:
        """Record what became of the run, unless another process is training it."""
        seconds = self.arm.seconds + (time.monotonic() - self.began if self.began is not None else 0)
        self._write(replace(self.arm, status=status, error=error, seconds=round(seconds, 1)))

    def end_now(self, error: str | None) -> None:
        """Record the end from a thread, just before it ends the process: of an error, or None after a signal."""
        status: Status = "FAILED" if error else "STOPPED"
        if self.began is None:
            if self.arm.sweep is not None:
                self.end(status, error)
            return
        seconds = round(self.arm.seconds + time.monotonic() - self.began, 1)
        with suppress(UserError, OSError):  # the main thread holds the run's lock
            write_arm(self.home.path, replace(self.arm, status=status, error=error, seconds=seconds))

    def stopped_at(self) -> float | None:
        """When a signal ended this run, in seconds since the epoch; None where something else was last."""
        found = arm_so_far(self.home.path)
        return self.home.arm.stat().st_mtime if found and found.status == "STOPPED" else None

    def _write(self, arm: Arm) -> None:
        with suppress(UserError, OSError):  # a full disk must not hide why the run ended
            self.home.create()
            with self.home.locked():
                write_arm(self.home.path, arm)
