"""MLflow: by default the SQLite file mlflow.db in the working directory, which a plain `mlflow ui` there shows."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from nai_xl.distributed import activity
from nai_xl.errors import UserError, one_line
from nai_xl.record.json_file import Damaged
from nai_xl.redact import redacted
from nai_xl.tracker.jsonl import JsonlTracker
from nai_xl.tracker.mlflow.delivery import Delivery, Progress
from nai_xl.tracker.mlflow.store import VARIABLE, chosen_uri, failures, how_to_serve, refuses, run_page
from nai_xl.tracker.mlflow.sweep import MlflowSweep
from nai_xl.tracker.sweep import SweepTracker

FIRST_DELAY, LAST_DELAY = 1.0, 60.0  # seconds between attempts at a store that does not answer, doubling
OPENING = 60.0  # seconds that the start of a run waits for the store to open
PATIENCE = 30.0  # seconds that the end of a run waits for a store that takes nothing


class MlflowTracker(JsonlTracker):
    """Keeps JsonlTracker's record, and has a thread that sends it to MLflow.

    A resumed run continues its MLflow run. All of the record is sent again where that run has been deleted or the store
    is another one.

    A store that fails while the run goes on neither ends the run nor slows it. The rows that wait are sent when the
    store answers again, at the next start, or by `python -m nai_xl.sync`. Raises UserError at the start when the store
    cannot be opened, unless it has answered this run or one beside it before.
    """

    def __init__(self, run_dir: Path, *, experiment: str = "nai_xl", uri: str | None = None):
        super().__init__(run_dir)
        self.delivery = Delivery(run_dir, chosen_uri(uri), experiment)
        self.typed = uri

    @classmethod
    def of_sweep(cls, *, uri: str | None = None, experiment: str = "nai_xl", **others: Any) -> SweepTracker:
        return MlflowSweep(uri=uri, experiment=experiment)

    @staticmethod
    def described(uri: str | None = None) -> str:
        """The store, for the table that a run begins with."""
        from_environment = "" if uri or not os.environ.get(VARIABLE) else f" ({VARIABLE})"
        return f"{redacted(chosen_uri(uri))}{from_environment}"

    def __enter__(self) -> MlflowTracker:
        super().__enter__()
        self.sender = Sender(self.delivery)
        self.sender.start()
        error = self.sender.opened_within(OPENING)
        if error is not None and refuses(self.typed) and not self._has_answered_before():
            self.sender.ending.set()
            raise UserError(
                f"cannot open the MLflow store {redacted(self.delivery.uri)} ({one_line(error)}). Set tracker.uri=..., "
                "or use tracker=jsonl."
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        self.sender.close()

    def _has_answered_before(self) -> bool:
        """Whether the store has this run or one beside it. Then its address is right, and it may answer again."""
        links = map(Progress.read, {self.run_dir, *(path.parent for path in self.run_dir.parent.glob("*/mlflow.json"))})
        uri = redacted(self.delivery.uri)
        return any(link and link.run_id and redacted(link.uri) == uri for link in links)

    def params(self, flat: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        super().params(flat, tags)
        self.sender.wake()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        super().log(step, values)
        self.sender.wake()

    def figure(self, name: str, step: int, image: Image.Image) -> None:
        super().figure(name, step, image)
        self.sender.wake()

    def artifact(self, path: Path) -> None:
        super().artifact(path)
        self.sender.wake()

    def where(self) -> list[str]:
        lines, progress = super().where(), self.delivery.progress
        if serve := how_to_serve(progress.uri):
            lines.append(f"MLflow       {serve}   (experiment {progress.experiment})")
        if progress.run_id:
            lines.append(f"             {run_page(progress.uri, progress.experiment_id, progress.run_id)}")
        return lines


class Sender(threading.Thread):
    """Sends what waits whenever it is woken. After a failure it tries again, and waits longer each time."""

    def __init__(self, delivery: Delivery):
        super().__init__(name="mlflow sender", daemon=True)  # a store that hangs must not keep the program from ending
        self.delivery, self.told = delivery, False
        self.due, self.ending, self.tried = threading.Event(), threading.Event(), threading.Event()
        self.error: Exception | None = None  # of the attempt to open the store
        self.delay = FIRST_DELAY

    def wake(self) -> None:
        self.due.set()

    def opened_within(self, seconds: float) -> Exception | None:
        """Wait until the store is open; the error if it cannot be opened. What is not well is told once."""
        if not self.tried.wait(seconds):
            self._failed(f"MLflow has not answered for {seconds:.0f} s")
            return None
        if self.error is not None:
            self._failed(str(self.error) if isinstance(self.error, Damaged) else _away(self.error))
        return self.error

    def run(self) -> None:
        try:
            self.delivery.open()
        except failures() as error:
            self.error = error
        self.tried.set()
        while not self.ending.is_set():
            self.due.wait()
            self.due.clear()
            if not self._attempt():
                self.due.set()
                self.ending.wait(self.delay)
                self.delay = min(2 * self.delay, LAST_DELAY)
        self._attempt()

    def _attempt(self) -> bool:
        try:
            self.delivery.deliver()
        except UserError as error:
            return self._failed(one_line(error))
        except failures() as error:
            return self._failed(_away(error))
        self.delay = FIRST_DELAY
        return True

    def _failed(self, why: str) -> bool:
        if not self.told:
            _tell(self.delivery.run_dir, why)
        self.told = True
        return False

    def close(self) -> None:
        """Send what waits for as long as the store takes some of it. Says on stderr what could not be sent."""
        self.ending.set()
        self.due.set()
        left, moved = self._position(), time.monotonic()
        while self.is_alive() and time.monotonic() - moved < PATIENCE:
            self.join(0.5)
            if (position := self._position()) != left:
                activity.beat("sending what MLflow lacks")  # other ranks wait for this one
                left, moved = position, time.monotonic()
        if waiting := self.delivery.waiting():
            print(
                f"MLflow lacks {waiting} rows of {self.delivery.run_dir}; when it answers again: "
                f"python -m nai_xl.sync {self.delivery.run_dir}",
                file=sys.stderr,
            )

    def _position(self) -> tuple[int, int]:
        return self.delivery.progress.metrics, self.delivery.progress.outbox


def _away(error: Exception) -> str:
    return f"MLflow does not answer ({one_line(error)[:200]})"


def _tell(run_dir: Path, why: str) -> None:
    print(f"{why}; {run_dir} keeps every number", file=sys.stderr)
