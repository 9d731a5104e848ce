"""A sweep in MLflow: its arms are runs that carry the tag `sweep`; one further run carries the report on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nai_xl.errors import UserError, one_line
from nai_xl.record.arm import read_arm
from nai_xl.record.journal import note_end, now, outbox_of
from nai_xl.record.json_file import Damaged
from nai_xl.redact import redacted
from nai_xl.tracker.mlflow.delivery import Delivery, Progress
from nai_xl.tracker.mlflow.store import (
    chosen_uri,
    compare_page,
    failures,
    how_to_serve,
    open_store,
    refuses,
    run_page,
    view_page,
)
from nai_xl.tracker.mlflow.view import fitted, view, view_tag
from nai_xl.tracker.sweep import SweepTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ENDS = {"FAILED": "FAILED", "STOPPED": "KILLED"}  # words of arm.json -> words of MLflow
NOTE = "mlflow.note.content"  # MLflow's description of a run or an experiment, in Markdown
NOTE_LENGTH, METRICS_PER_REQUEST = 8000, 1000


class MlflowSweep(SweepTracker):
    """Shows the sweep on MLflow's pages as a view of its own, and sends what its arms could not send themselves."""

    def __init__(self, *, uri: str | None = None, experiment: str = "nai_xl"):
        self.uri, self.experiment = chosen_uri(uri), experiment
        self.typed = uri

    def begin(
        self, sweep: str, question: str, keys: Sequence[str], metrics: Sequence[str], *, shared: Sequence[str] = ()
    ) -> list[str]:
        """Makes the store, adds the question to the experiment's description, and stores the sweep's view.

        Raises UserError when a typed address does not answer. Another store that does not is told: the arms keep all.
        """
        try:
            with _answering(self.uri, "set tracker.uri=..., or tracker=jsonl"):
                client, experiment_id = open_store(self.uri, self.experiment)
                _ask(client, experiment_id, sweep, question)
                client.set_experiment_tag(experiment_id, view_tag(sweep), view(sweep, keys, metrics, shared))
        except UserError as error:
            if refuses(self.typed):
                raise
            return [f"{error}; the arms keep every number until then"]
        serve = how_to_serve(self.uri)
        return [
            *([f"MLflow       {serve}   (experiment {self.experiment})"] if serve else []),
            f"arms         {view_page(self.uri, experiment_id, sweep, charts=False)}",
            f"curves       {view_page(self.uri, experiment_id, sweep, charts=True)}",
        ]

    def end(self, run_dirs: Sequence[Path]) -> list[str]:
        """Sends what MLflow still lacks of the arms. Arms that could not say themselves that they failed are marked as
        failed, and arms that were trained for an earlier sweep are counted to this one too. The lines say where MLflow
        compares the arms, or what to do when it does not answer.
        """
        unsent: list[str] = []
        damaged: list[str] = []
        last: Delivery | None = None
        for run_dir in run_dirs:
            try:
                last = self._sent(run_dir) or last
            except Damaged as error:
                damaged.append(f"error: {error}")
            except failures():
                unsent.append(str(run_dir))
        if last:
            with suppress(*failures()):  # the view's looks are not worth an error
                _fit_view(last, run_dirs)
        lines = [*compare_line(run_dirs), *damaged]
        if unsent:
            lines.append(f"MLflow does not answer; when it does: python -m nai_xl.sync {' '.join(unsent)}")
        return lines

    def _sent(self, run_dir: Path) -> Delivery | None:
        """Send what waits of one arm; None for an arm that has nothing to send."""
        if not _note_lost_end(run_dir):
            return None
        meant = Progress.read(run_dir)
        uri, experiment = (meant.uri, meant.experiment) if meant else (self.uri, self.experiment)
        uri = self.uri if redacted(self.uri) == redacted(uri) else uri
        delivery = Delivery(run_dir, uri, experiment)
        delivery.open()
        delivery.deliver()
        return delivery


def _note_lost_end(run_dir: Path) -> bool:
    """Note in an arm's record that it failed or was killed, where only arm.json says so. False for an arm that was
    stopped before it began to report.
    """
    statuses = [row["status"] for row in outbox_of(run_dir).rows() if row["kind"] == "status"]
    arm = read_arm(run_dir)
    if arm and arm.status in ENDS and (statuses[-1] if statuses else "RUNNING") == "RUNNING":
        if not statuses and arm.status == "STOPPED":
            return False
        note_end(run_dir, ENDS[arm.status], arm.error or "")
        return True
    return bool(statuses)


def _fit_view(delivery: Delivery, run_dirs: Sequence[Path]) -> None:
    """Let the view of the sweep that this run is an arm of show what all arms have."""
    arm = read_arm(delivery.run_dir)
    if delivery.client is None or arm is None or not arm.sweep:
        return
    experiment_id, key = delivery.progress.experiment_id, view_tag(arm.sweep)
    if stored := delivery.client.get_experiment(experiment_id).tags.get(key):
        delivery.client.set_experiment_tag(experiment_id, key, fitted(stored, run_dirs))


def compare_line(run_dirs: Iterable[Path]) -> list[str]:
    """A line that says where MLflow compares these arms; none where no arm has reached it."""
    arms = [progress for progress in map(Progress.read, run_dirs) if progress and progress.run_id]
    one_place = [arm for arm in arms if (arm.uri, arm.experiment_id) == (arms[0].uri, arms[0].experiment_id)]
    if not one_place:
        return []
    return [f"compare      {compare_page(arms[0].uri, arms[0].experiment_id, [arm.run_id for arm in one_place])}"]


# --- the report on a sweep --------------------------------------------------------------------------------------------


def log_summary(
    sweep: str,
    question: str,
    files: Sequence[Path],
    metrics: Mapping[str, float],
    *,
    uri: str | None = None,
    experiment: str = "nai_xl",
) -> str:
    """Log the report on a sweep, its figures and its numbers in one run `summary <sweep>`, tagged sweep_summary. A
    second call goes on with that run, or replaces it if it has metrics that the report no longer has. A report in
    Markdown is the run's description too, if it is short enough. The question is added to the experiment's description.
    Returns the address of the run's page.

    Raises UserError when the store does not answer.
    """
    uri = chosen_uri(uri)
    with _answering(uri, "python -m nai_xl.sync RUN_DIR --uri=... sends runs to another store"):
        client, experiment_id = open_store(uri, experiment)
        run = _summary(client, experiment_id, sweep, metrics)
        run_id = str(run.info.run_id)
        client.set_tag(run_id, NOTE, _description(question, files), synchronous=True)
        for path in files:
            client.log_artifact(run_id, str(path))
        _set_metrics(client, run, metrics)
        client.set_terminated(run_id)
        _ask(client, experiment_id, sweep, question)
    return run_page(uri, experiment_id, run_id)


@contextmanager
def _answering(uri: str, cure: str) -> Iterator[None]:
    try:
        yield
    except failures() as error:
        raise UserError(f"the MLflow store {uri} does not answer ({one_line(error)}); {cure}") from error


def _summary(client: MlflowClient, experiment_id: str, sweep: str, metrics: Mapping[str, float]) -> Run:
    for run in client.search_runs([experiment_id], f"tags.sweep_summary = '{sweep}'"):
        if run.data.metrics.keys() <= metrics.keys():
            return run
        client.delete_run(run.info.run_id)  # MLflow cannot delete a metric alone
    tags = {"sweep_summary": sweep, "mlflow.source.name": "nai_xl.compare", "mlflow.source.type": "LOCAL"}
    return client.create_run(experiment_id, run_name=f"summary {sweep}", tags=tags)


def _description(question: str, files: Sequence[Path]) -> str:
    reports = [path.read_text(encoding="utf-8") for path in files if path.suffix == ".md"]
    return reports[0] if reports and len(reports[0]) <= NOTE_LENGTH else question


def _set_metrics(client: MlflowClient, run: Run, metrics: Mapping[str, float]) -> None:
    """Log the metrics that are new or changed: the same report twice is one point, not two."""
    from mlflow.entities import Metric

    time = now()
    changed = [Metric(name, value, time, 0) for name, value in metrics.items() if run.data.metrics.get(name) != value]
    for start in range(0, len(changed), METRICS_PER_REQUEST):
        client.log_batch(run.info.run_id, metrics=changed[start : start + METRICS_PER_REQUEST], synchronous=True)


def _ask(client: MlflowClient, experiment_id: str, sweep: str, question: str) -> None:
    """Put the line '- **sweep**: question' into the experiment's description, beside those of other sweeps."""
    described = str(client.get_experiment(experiment_id).tags.get(NOTE, ""))
    begins = f"- **{sweep}**: "
    others = [line for line in described.splitlines() if not line.startswith(begins)]
    client.set_experiment_tag(experiment_id, NOTE, "\n".join([*others, begins + " ".join(question.split())]))
