"""Brings the record of a run directory to MLflow: everything, once, in however many attempts.

How far it is stands in <run>/mlflow.json, moved on only after the store has answered. What is sent again because an
answer was lost changes nothing: a metric is known to MLflow's database by (run, name, step, time, value), its primary
key, and all of these stand in the record; pictures and files have names of their own; tags and params are set, not
added.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from PIL import Image

from nai_xl.files import write_atomically
from nai_xl.record.arm import read_arm
from nai_xl.record.config import read_params
from nai_xl.record.journal import metrics_of, outbox_of
from nai_xl.tracker.mlflow.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

KEY_LENGTH, VALUE_LENGTH = 250, 6000  # characters of a name and of a param in MLflow
PARAMS_PER_REQUEST, METRICS_PER_REQUEST = 100, 1000
THUMBNAIL = 256  # pixels of the longer edge of the small copies that MLflow's charts show
LOCK_SECONDS = 60
TOKEN = "mlflow.nai_xl.record"  # the pages' tables do not show tags that begin with mlflow.
RENAMED = {"git_commit": "mlflow.source.git.commit"}  # tags for which MLflow has a place of its own


@dataclass
class Progress:
    """Where a run directory's record goes, and how much of it has arrived."""

    uri: str
    experiment: str
    token: str  # the record's own name, older than its run: finds one whose creation was not answered, or sent earlier
    experiment_id: str = ""
    run_id: str = ""
    metrics: int = 0  # bytes of metrics.jsonl
    outbox: int = 0  # bytes of outbox.jsonl

    @classmethod
    def read(cls, run_dir: Path) -> Progress | None:
        """None where nothing was ever to be sent."""
        try:
            return cls(**json.loads((run_dir / "mlflow.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, run_dir: Path) -> None:
        content = json.dumps(dataclasses.asdict(self))
        write_atomically(run_dir / "mlflow.json", lambda path: path.write_text(content))


class Delivery:
    """One run directory on its way to one store. A directory that was sent elsewhere before is sent anew, whole."""

    def __init__(self, run_dir: Path, uri: str, experiment: str):
        self.run_dir, self.uri, self.experiment = run_dir, uri, experiment
        self.metrics, self.outbox = metrics_of(run_dir), outbox_of(run_dir)
        self.client: MlflowClient | None = None
        with self._locked():
            known = Progress.read(run_dir)
            if known is None or (known.uri, known.experiment) != (uri, experiment):
                known = Progress(uri, experiment, known.token if known else uuid.uuid4().hex)
                known.write(run_dir)
            self.progress = known

    def waiting(self) -> int:
        """Rows of the record that the store does not have yet."""
        progress = Progress.read(self.run_dir) or self.progress
        return sum(1 for _ in self.metrics.after(progress.metrics)) + sum(1 for _ in self.outbox.after(progress.outbox))

    def open(self) -> None:
        """Find or create the run in the store. Raises MlflowException or OSError when the store does not answer."""
        with self._locked():
            self._open()

    def deliver(self) -> int:
        """Send what waits; the number of rows sent. Raises MlflowException or OSError, after which what was not sent
        still waits.
        """
        with self._locked():
            client = self.client or self._open()
            return self._send_metrics(client) + self._send_rest(client)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with mlflow.json: a run that trains and one who sends its record by hand take turns."""
        with FileLock(str(self.run_dir / ".mlflow.lock"), timeout=LOCK_SECONDS):
            if known := Progress.read(self.run_dir):
                self.progress = known
            yield

    # --- the run ------------------------------------------------------------------------------------------------------

    def _open(self) -> MlflowClient:
        client, self.progress.experiment_id = open_store(self.uri, self.experiment)
        run = self._known(client) or self._created(client)
        self.progress.write(self.run_dir)
        self._describe(client, run)
        self.client = client
        return client

    def _known(self, client: MlflowClient) -> Run | None:
        """This record's run; None if the store has none, and then all of the record is still to be sent."""
        from mlflow.exceptions import MlflowException

        run_id = self.progress.run_id
        if not run_id:
            found = client.search_runs([self.progress.experiment_id], f"tags.`{TOKEN}` = '{self.progress.token}'")
            run_id = str(found[0].info.run_id) if found else ""
        if not run_id:
            return None
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        self.progress.run_id = run_id
        return run if run.info.lifecycle_stage == "active" else None

    def _created(self, client: MlflowClient) -> Run:
        self.progress = Progress(self.uri, self.experiment, self.progress.token, self.progress.experiment_id)
        began = next((int(row["time"]) for row in self.outbox.rows()), None)
        source = {"mlflow.source.name": "nai_xl.train", "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
        run = client.create_run(
            self.progress.experiment_id,
            start_time=began,
            run_name=self.run_dir.name,
            tags={TOKEN: self.progress.token, **source},
        )
        self.progress.run_id = str(run.info.run_id)
        return run

    def _describe(self, client: MlflowClient, run: Run) -> None:
        """Name and tags by the run's place in its sweep, where it has one."""
        self._tag(client, {k: v for k, v in arm_tags(self.run_dir).items() if run.data.tags.get(k) != v})

    def _tag(self, client: MlflowClient, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            rows = [RunTag(_name(key), str(value)) for key, value in tags.items()]
            client.log_batch(self.progress.run_id, tags=rows, synchronous=True)

    # --- numbers ------------------------------------------------------------------------------------------------------

    def _send_metrics(self, client: MlflowClient) -> int:
        sent = 0
        for rows in _portions(self.metrics.after(self.progress.metrics)):
            metrics = [metric for _, row in rows for metric in _metrics(row)]
            for start in range(0, len(metrics), METRICS_PER_REQUEST):
                part = metrics[start : start + METRICS_PER_REQUEST]
                client.log_batch(self.progress.run_id, metrics=part, synchronous=True)
            sent += len(rows)
            self.progress.metrics = rows[-1][0]
            self.progress.write(self.run_dir)
        return sent

    # --- everything else ----------------------------------------------------------------------------------------------

    def _send_rest(self, client: MlflowClient) -> int:
        ways: dict[str, Callable[[MlflowClient, Mapping[str, Any]], None]] = {
            "params": self._send_params,
            "tags": lambda client, row: self._tag(client, {RENAMED.get(k, k): v for k, v in row["tags"].items()}),
            "figure": self._send_figure,
            "artifact": self._send_artifact,
            "status": self._send_status,
        }
        sent = 0
        for end, row in self.outbox.after(self.progress.outbox):
            ways[row["kind"]](client, row)
            sent += 1
            self.progress.outbox = end
            self.progress.write(self.run_dir)
        return sent

    def _send_params(self, client: MlflowClient, row: Mapping[str, Any]) -> None:
        """Those that MLflow does not have: it refuses to change one, and what may change when a run is continued is
        not worth a new run.
        """
        from mlflow.entities import Param

        given = read_params(self.run_dir).params
        known = client.get_run(self.progress.run_id).data.params
        named = {_name(key): str(value)[:VALUE_LENGTH] for key, value in given.items()}
        missing = [Param(key, value) for key, value in named.items() if key not in known]
        for start in range(0, len(missing), PARAMS_PER_REQUEST):
            part = missing[start : start + PARAMS_PER_REQUEST]
            client.log_batch(self.progress.run_id, params=part, synchronous=True)

    def _send_figure(self, client: MlflowClient, row: Mapping[str, Any]) -> None:
        """As MlflowClient.log_image does, whose files have random names: sent twice, they would be two pictures."""
        path = self.run_dir / row["file"]
        if not path.is_file():
            return  # a person has tidied up
        key = re.sub(r"[^\w\-. ~]", "_", row["name"].replace("/", "~"))
        own = uuid.uuid5(uuid.UUID(self.progress.token), f"{row['name']} {row['step']}")
        name = f"{key}+step+{row['step']}+timestamp+{row['time']}+{own}"
        with tempfile.TemporaryDirectory() as folder:
            whole, small = Path(folder, f"{name}.png"), Path(folder, f"{name}+compressed.webp")
            whole.write_bytes(path.read_bytes())
            with Image.open(io.BytesIO(whole.read_bytes())) as image:
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                image.save(small)
            client.log_artifact(self.progress.run_id, str(whole), "images")
            client.log_artifact(self.progress.run_id, str(small), "images")
        self._tag(client, {"mlflow.loggedImages": "True"})

    def _send_artifact(self, client: MlflowClient, row: Mapping[str, Any]) -> None:
        path = self.run_dir / row["file"]
        if path.is_file():
            client.log_artifact(self.progress.run_id, str(path))

    def _send_status(self, client: MlflowClient, row: Mapping[str, Any]) -> None:
        run_id = self.progress.run_id
        if row["error"]:
            self._tag(client, {"error": row["error"]})
        elif "error" in client.get_run(run_id).data.tags:
            client.delete_tag(run_id, "error")
        if row["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, row["status"], end_time=int(row["time"]))


# --- words of the record in words of MLflow ---------------------------------------------------------------------------


def arm_tags(run_dir: Path) -> dict[str, str]:
    """The tags that a run has as an arm of a sweep: sweep, seed, the varied keys and a name of the values alone; of
    earlier sweeps that it is an arm of, membership. {} outside of sweeps.
    """
    arm = read_arm(run_dir)
    if arm is None or not arm.sweep:
        return {}
    varied = {str(key): str(value) for key, value in arm.arm.items()}
    name = " ".join([*(_short(key, value) for key, value in varied.items()), f"s{arm.seed}"])
    sweeps = dict.fromkeys(map(member_tag, [*arm.sweeps, arm.sweep]), "arm")
    return {**varied, "sweep": arm.sweep, "seed": str(arm.seed), "mlflow.runName": name, **sweeps}


def member_tag(sweep: str) -> str:
    """A tag that every arm of a sweep keeps, also when it becomes an arm of another one; not shown in the tables."""
    return _name(f"mlflow.nai_xl.sweep.{sweep}")


def _short(key: str, value: str) -> str:
    """'ztsnr' of a group's option, 'lr=0.001' of a value."""
    return f"{key.rpartition('.')[2]}={value}" if "." in key else value.strip("[]").replace(",", "+")


def _name(key: str) -> str:
    """A name that MLflow takes: letters, digits and _-. :/"""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:KEY_LENGTH]


def _metrics(row: Mapping[str, Any]) -> Iterator[Metric]:
    """A row's values. Without infinity, which MLflow reads back as 1.8e308: that ruins a chart."""
    from mlflow.entities import Metric

    for name, value in row.items():
        if name not in ("step", "time") and math.isfinite(value):
            yield Metric(_name(name), value, int(row["time"]), int(row["step"]))


def _portions(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Rows in lists of about a request each, so that long waiting ones are not sent all over again after an error."""
    portion: list[tuple[int, dict[str, Any]]] = []
    values = 0
    for row in rows:
        portion.append(row)
        values += len(row[1])
        if values >= METRICS_PER_REQUEST:
            yield portion
            portion, values = [], 0
    if portion:
        yield portion


def _user() -> str:
    try:
        return getuser()
    except (KeyError, OSError):  # a container's user without an entry in passwd
        return "unknown"
