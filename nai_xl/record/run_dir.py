"""The run directory: the place of each of its files, the lock of whoever trains it, and the data it was begun with."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from nai_xl.errors import UserError
from nai_xl.files import remove_strays, sync
from nai_xl.record.json_file import Damaged, keep_aside, read_json, write_json


@dataclass(frozen=True)
class TrainedOn:
    """The content of run.json: the fingerprint of the data that the run was begun with, and how many images."""

    data: str
    images: int


_TRAINED_ON = TypeAdapter(TrainedOn)


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run. Only the modules of this package, and trackers for their own files, read or write them.

    config.yaml, params.json     what was asked for (record.config)
    arm.json                     what became of the run (record.arm)
    metrics.jsonl, outbox.jsonl  what the run reported (record.journal, record.metrics)
    items/                       what evaluations measured on single items (record.items)
    progress.json                how far the run has been reported and delivered (record.progress)
    run.json, latents.json       the data that the run began with, and the statistics of their latents
    trained_on.arrow             every image of these data, by hashes (data.drift)
    data_changes.jsonl           when the run went on with other data
    skipped.csv                  images that could not be used
    tag_weights.csv              which tags' images count more, and which less, where the images' weights differ
    log.txt                      the output of an arm that a sweep has trained
    checkpoints/ samples/ profile/ pipeline/
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def params(self) -> Path:
        return self.path / "params.json"

    @property
    def arm(self) -> Path:
        return self.path / "arm.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def outbox(self) -> Path:
        return self.path / "outbox.jsonl"

    @property
    def items(self) -> Path:
        return self.path / "items"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def data(self) -> Path:
        return self.path / "run.json"

    @property
    def images(self) -> Path:
        return self.path / "trained_on.arrow"

    @property
    def data_changes(self) -> Path:
        return self.path / "data_changes.jsonl"

    @property
    def latents(self) -> Path:
        """mean and std by which the run has normalised its latents from the beginning."""
        return self.path / "latents.json"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped.csv"

    @property
    def tag_weights(self) -> Path:
        return self.path / "tag_weights.csv"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def pipeline(self) -> Path:
        return self.path / "pipeline"

    def newest_samples(self) -> list[Path]:
        """The last sample grid, if there is one."""
        return sorted(self.samples.glob("*.png"))[-1:]

    def create(self) -> None:
        """Raises UserError when the directory cannot be written."""
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True, exist_ok=True)
                sync(self.path.parent)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # several processes may probe at once
        except OSError as error:
            raise UserError(
                f"output_dir={self.path.parent} cannot be written ({error.strerror}); set output_dir=DIR"
            ) from error

    def tidy(self) -> None:
        """Remove files that a killed process has left half written. The caller holds the run's lock."""
        for folder in (self.path, *(path for path in self.path.glob("*/") if path != self.pipeline)):
            remove_strays(folder)

    @contextmanager
    def locked(self, patience: float = 0) -> Iterator[None]:
        """Hold the run's lock. Raises UserError when another process holds it for longer than `patience` seconds."""
        lock = FileLock(str(self.path / ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._wait_for(lock, patience)
        try:
            yield
        finally:
            lock.release()

    def _wait_for(self, lock: FileLock, patience: float) -> None:
        if patience:
            print(f"waiting for another process that trains {self.path}", file=sys.stderr)
        try:
            lock.acquire(timeout=patience)
        except Timeout as error:
            raise UserError(
                f"{self.path} is being trained by another process; set name=NAME for a second run"
            ) from error

    def trained_on(self) -> TrainedOn | None:
        """Which data the run was begun with; None where it has not got that far."""
        return read_json(self.data, _TRAINED_ON, "remove the file if the data are still those of the run")

    def _noted_fingerprint(self) -> str | None:
        """The data's fingerprint in params.json, if that can be read."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            return str(json.loads(self.params.read_bytes())["params"]["data_fingerprint"])
        return None

    def accept_other_data(self, step: int, what: str) -> None:
        """From `step` on the run is trained on other data, which claim_data will note. Raises OSError."""
        with self.data_changes.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), "changes": what}) + "\n")
        self.data.unlink(missing_ok=True)

    def claim_data(self, fingerprint: str, images: int) -> None:
        """Note which data the run is trained on. Raises UserError when it was begun with other data."""
        try:
            before = self.trained_on()
        except Damaged:
            if self._noted_fingerprint() != fingerprint:
                raise
            keep_aside(self.data, f"it is made anew, since {self.params.name} has these data too")
            before = None
        if before is None:
            write_json(self.data, asdict(TrainedOn(fingerprint, images)))
        elif before.data != fingerprint:
            raise UserError(
                f"the data have changed since {self.path.name} began ({before.images} images then, {images} now, or "
                "other captions). Set name=NAME to begin a new run, or bring the data back to continue this one."
            )
