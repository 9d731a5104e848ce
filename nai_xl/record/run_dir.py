"""The run directory: what belongs to one run, and whether it may be continued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from nai_xl.errors import UserError


@dataclass(frozen=True)
class RunDirectory:
    """`path` holds config.yaml, run.json, latents.json, metrics.jsonl, skipped.csv, checkpoints/, samples/ and at last
    pipeline/.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def latents(self) -> Path:
        """mean and std that the run's latents are normalised by, from its beginning."""
        return self.path / "latents.json"

    @property
    def pipeline(self) -> Path:
        return self.path / "pipeline"

    def newest_samples(self) -> list[Path]:
        """The last sample grid, if there is one."""
        return sorted((self.path / "samples").glob("*.png"))[-1:]

    def create(self) -> None:
        """Raises UserError where it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # several processes look at once
        except OSError as error:
            raise UserError(
                f"output_dir={self.path.parent} cannot be written ({error.strerror}); set output_dir=DIR"
            ) from error

    def lock(self) -> FileLock:
        """Held while the run trains. Raises UserError when another process holds it."""
        lock = FileLock(str(self.path / ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"{self.path} is being trained by another process; set name=NAME for a second run"
            ) from error
        return lock

    @contextmanager
    def held(self, first: bool) -> Iterator[None]:
        """The run's lock, for the rank that writes; the others are its own processes."""
        lock = self.lock() if first else None
        try:
            yield
        finally:
            if lock:
                lock.release()

    def claim_data(self, fingerprint: str, images: int) -> None:
        """Note the data the run is trained on. Raises UserError when it began with other data."""
        note = self.path / "run.json"
        if not note.exists():
            note.write_text(json.dumps({"data": fingerprint, "images": images}))
            return
        began = json.loads(note.read_text())
        if began["data"] != fingerprint:
            raise UserError(
                f"the data have changed since {self.path.name} began ({began['images']} images then, {images} now, or "
                "other captions). Set name=NAME to begin a new run, or bring the data back to continue this one."
            )
