"""A sweep in MLflow: its arms are runs that carry the tag `sweep`; one further run carries the report on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nai_xl.errors import UserError, one_line
from nai_xl.report.mlflow_delivery import Progress
from nai_xl.report.mlflow_store import chart_page, compare_page, default_uri, how_to_serve, open_store, run_page
from nai_xl.report.tracking import now

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

NOTE = "mlflow.note.content"  # MLflow's description of a run or an experiment, in Markdown
NOTE_LENGTH, METRICS_PER_REQUEST = 8000, 1000


def sweep_pages(sweep: str, run_dirs: Iterable[Path]) -> list[str]:
    """Lines that tell a person where MLflow shows these arms; none where no arm has got there."""
    arms = [progress for progress in map(Progress.read, run_dirs) if progress and progress.run_id]
    if not arms:
        return []
    uri, experiment_id = arms[0].uri, arms[0].experiment_id
    together = [arm.run_id for arm in arms if (arm.uri, arm.experiment_id) == (uri, experiment_id)]
    serve = how_to_serve(uri)
    return [
        *([f"MLflow       {serve}   (experiment {arms[0].experiment})"] if serve else []),
        f"curves       {chart_page(uri, experiment_id, sweep)}",
        f"compare      {compare_page(uri, experiment_id, together)}",
    ]


def log_summary(
    sweep: str,
    question: str,
    files: Sequence[Path],
    metrics: Mapping[str, float],
    *,
    uri: str | None = None,
    experiment: str = "nai_xl",
) -> str:
    """One run `summary <sweep>`, tagged sweep_summary, with the report, its figures and numbers; the same run when
    called again. A report in Markdown is its description, too, if short enough. The question joins those in the
    experiment's description. Returns the run's page.

    Raises UserError when the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    uri = uri or default_uri()
    try:
        client, experiment_id = open_store(uri, experiment)
        run = _summary(client, experiment_id, sweep)
        run_id = str(run.info.run_id)
        client.set_tag(run_id, NOTE, _description(question, files), synchronous=True)
        for path in files:
            client.log_artifact(run_id, str(path))
        _set_metrics(client, run, metrics)
        client.set_terminated(run_id)
        _ask(client, experiment_id, sweep, question)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"the MLflow store {uri} does not take the summary ({one_line(error)}). Set tracker.uri=..."
        ) from error
    return run_page(uri, experiment_id, run_id)


def _summary(client: MlflowClient, experiment_id: str, sweep: str) -> Run:
    found = client.search_runs([experiment_id], f"tags.sweep_summary = '{sweep}'")
    if found:
        return found[0]
    tags = {"sweep_summary": sweep, "mlflow.source.name": "nai_xl.compare", "mlflow.source.type": "LOCAL"}
    return client.create_run(experiment_id, run_name=f"summary {sweep}", tags=tags)


def _description(question: str, files: Sequence[Path]) -> str:
    reports = [path.read_text(encoding="utf-8") for path in files if path.suffix == ".md"]
    return reports[0] if reports and len(reports[0]) <= NOTE_LENGTH else question


def _set_metrics(client: MlflowClient, run: Run, metrics: Mapping[str, float]) -> None:
    """Those that are new or changed: the same report twice is one point, not two."""
    from mlflow.entities import Metric

    time = now()
    changed = [Metric(name, value, time, 0) for name, value in metrics.items() if run.data.metrics.get(name) != value]
    for start in range(0, len(changed), METRICS_PER_REQUEST):
        client.log_batch(run.info.run_id, metrics=changed[start : start + METRICS_PER_REQUEST], synchronous=True)


def _ask(client: MlflowClient, experiment_id: str, sweep: str, question: str) -> None:
    """A line '- **sweep**: question' in the experiment's description, beside those of other sweeps."""
    described = str(client.get_experiment(experiment_id).tags.get(NOTE, ""))
    begins = f"- **{sweep}**: "
    others = [line for line in described.splitlines() if not line.startswith(begins)]
    client.set_experiment_tag(experiment_id, NOTE, "\n".join([*others, begins + " ".join(question.split())]))
