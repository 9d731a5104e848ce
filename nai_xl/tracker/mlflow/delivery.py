"""Brings the record of a run directory to MLflow: all of it, once, in however many attempts.

<run>/mlflow.json says how much has arrived, and is written only after the store has answered. A row whose answer was
lost is sent again, which changes nothing. A metric's primary key in MLflow's database is (run, name, step, time,
value), and the record has all of these; pictures and files have fixed names; tags and params are set, not added.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from PIL import Image

from nai_xl.errors import UserError
from nai_xl.files import write_atomically
from nai_xl.record.config import read_params
from nai_xl.record.journal import metrics_of, outbox_of
from nai_xl.record.json_file import keep_aside
from nai_xl.redact import redacted
from nai_xl.tracker.mlflow.store import open_store
from nai_xl.tracker.mlflow.words import VALUE_LENGTH, arm_tags, metrics_in, valid_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARAMS_PER_REQUEST, METRICS_PER_REQUEST = 100, 1000
THUMBNAIL = 256  # pixels of the longer edge of the small copies that MLflow's charts show
LOCK_SECONDS = 60
TOKEN = "mlflow.nai_xl.record"  # the pages' tables do not show tags that begin with mlflow.
RENAMED = {"git_commit": "mlflow.source.git.commit"}  # tags for which MLflow has a place of its own


@dataclass
class Progress:
    """The content of mlflow.json: where a run's record goes, and how much of it has arrived."""

    uri: str  # *** for user and password, which are not kept: store.with_login
    experiment: str
    token: str  # made before the run and stored as its tag: finds a run whose creation was not confirmed
    experiment_id: str = ""
    run_id: str = ""
    metrics: int = 0  # bytes of metrics.jsonl
    outbox: int = 0  # bytes of outbox.jsonl

    @classmethod
    def read(cls, run_dir: Path) -> Progress | None:
        """None where the record was not meant for MLflow, or mlflow.json is damaged and all is to be sent again."""
        try:
            return cls(**json.loads((run_dir / "mlflow.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, run_dir: Path) -> None:
        content = json.dumps(dataclasses.asdict(self) | {"uri": redacted(self.uri)})
        write_atomically(run_dir / "mlflow.json", lambda path: path.write_text(content))


class Delivery:
    """Sends one run directory to one store. All of the record is sent when it went to another store before."""

    def __init__(self, run_dir: Path, uri: str, experiment: str):
        self.run_dir, self.uri, self.experiment = run_dir, uri, experiment
        self.metrics, self.outbox = metrics_of(run_dir), outbox_of(run_dir)
        self.client: MlflowClient | None = None
        with self._locked():
            known = Progress.read(run_dir)
            if known is None:
                keep_aside(run_dir / "mlflow.json", "all of the record is sent again, to a new run of MLflow")
            if known is None or (redacted(known.uri), known.experiment) != (redacted(uri), experiment):
                known = Progress(redacted(uri), experiment, known.token if known else uuid.uuid4().hex)
                known.write(run_dir)
            self.progress = known

    def waiting(self) -> int:
        """How many rows of the record the store does not have yet."""
        progress = Progress.read(self.run_dir) or self.progress
        return sum(1 for _ in self.metrics.after(progress.metrics)) + sum(1 for _ in self.outbox.after(progress.outbox))

    def open(self) -> None:
        """Find or create the run in the store. Raises one of store.failures when the store does not answer, and
        UserError for an address without its login or a damaged arm.json.
        """
        with self._locked():
            self._open()

    def deliver(self) -> int:
        """Send the rows that the store does not have yet. Returns how many were sent.

        Raises what `open` raises; what was not sent is still waiting then.
        """
        with self._locked():
            client = self.client or self._open()
            return self._send_metrics(client) + self._send_rest(client)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold mlflow.json: the run itself and `nai_xl.sync` take turns. Raises UserError where one takes too long."""
        lock = FileLock(str(self.run_dir / ".mlflow.lock"))
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise UserError(
                f"another process, nai_xl.sync most likely, is sending {self.run_dir} to MLflow; wait until it ends"
            ) from error
        try:
            if known := Progress.read(self.run_dir):
                self.progress = known
            yield
        finally:
            lock.release()

    # --- the run ------------------------------------------------------------------------------------------------------

    def _open(self) -> MlflowClient:
        client, self.progress.experiment_id = open_store(self.uri, self.experiment)
        run = self._known(client) or self._created(client)
        self.progress.write(self.run_dir)
        self._describe(client, run)
        self.client = client
        return client

    def _known(self, client: MlflowClient) -> Run | None:
        """This record's run; None if the store has none, so that all of the record is still to be sent."""
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
        self.progress = Progress(redacted(self.uri), self.experiment, self.progress.token, self.progress.experiment_id)
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
        """Set the name and the tags that an arm of a sweep has."""
        self._tag(client, {k: v for k, v in arm_tags(self.run_dir).items() if run.data.tags.get(k) != v})

    def _tag(self, client: MlflowClient, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            rows = [RunTag(valid_name(key), str(value)) for key, value in tags.items()]
            client.log_batch(self.progress.run_id, tags=rows, synchronous=True)

    # --- numbers ------------------------------------------------------------------------------------------------------

    def _send_metrics(self, client: MlflowClient) -> int:
        sent = 0
        for rows in _portions(self.metrics.after(self.progress.metrics)):
            metrics = [metric for _, row in rows for metric in metrics_in(row)]
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
            "nonfinite": lambda client, row: None,  # train/skipped_steps says as much
        }
        sent = 0
        for end, row in self.outbox.after(self.progress.outbox):
            ways[row["kind"]](client, row)
            sent += 1
            self.progress.outbox = end
            self.progress.write(self.run_dir)
        return sent

    def _send_params(self, client: MlflowClient, row: Mapping[str, Any]) -> None:
        """Send the params that MLflow does not have yet. It refuses to change one, and the few params that may change
        when a run is continued are not worth a new run.
        """
        from mlflow.entities import Param

        given = read_params(self.run_dir).params
        known = client.get_run(self.progress.run_id).data.params
        named = {valid_name(key): str(value)[:VALUE_LENGTH] for key, value in given.items()}
        missing = [Param(key, value) for key, value in named.items() if key not in known]
        for start in range(0, len(missing), PARAMS_PER_REQUEST):
            part = missing[start : start + PARAMS_PER_REQUEST]
            client.log_batch(self.progress.run_id, params=part, synchronous=True)

    def _send_figure(self, client: MlflowClient, row: Mapping[str, Any]) -> None:
        """What MlflowClient.log_image does, with a fixed file name: log_image draws one at random, and a picture sent
        twice would be two.
        """
        path = self.run_dir / row["file"]
        if not path.is_file():
            return  # removed by a person
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


def send(run_dir: Path, uri: str | None = None, experiment: str | None = None) -> int:
    """Send a run's record to the store it was meant for, or to `uri`. Returns how many rows were sent.

    Raises FileNotFoundError when there is no such run or no store is named, and what Delivery.open raises.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError("no such directory")
    meant = Progress.read(run_dir)
    uri, experiment = uri or (meant.uri if meant else None), experiment or (meant.experiment if meant else "nai_xl")
    if uri is None:
        raise FileNotFoundError("it was not meant for MLflow; --uri says where to send it")
    delivery = Delivery(run_dir, uri, experiment)
    delivery.open()  # name and tags may have changed even if no row waits
    return delivery.deliver()


def runs_in(outputs: Path, *, meant_for_mlflow: bool) -> list[Path]:
    """The run directories in `outputs`: all of them, or those whose tracker was MLflow."""
    found = sorted(path.parent for path in outputs.glob("*/metrics.jsonl"))
    return [path for path in found if Progress.read(path)] if meant_for_mlflow else found


def _portions(rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Rows in lists of about one request each, so that an error makes only one list be sent again."""
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
    except (KeyError, OSError):  # in a container, the user may have no entry in passwd
        return "unknown"
