"""Runs whose directories are on another machine, read from MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nai_xl.compare.runs.run import Run
from nai_xl.errors import UserError
from nai_xl.tracker.mlflow.store import failures, opened

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

PAGE = 1000  # runs of one answer
STATUS = {"KILLED": "STOPPED", "SCHEDULED": "RUNNING"}
NOTES = ("seed", "error", "git_commit", "data_fingerprint", "signature")  # tags that name no choice


def search_mlflow(uri: str, query: str) -> tuple[MlflowClient, list[MlflowRun]]:
    """The runs that an MLflow filter string selects, in all experiments.

    Raises UserError when MLflow cannot answer, or selects none.
    """
    try:
        with opened(uri) as client:
            experiments = [known.experiment_id for known in client.search_experiments()]
        found = list(_every_page(client, experiments, query))
    except failures() as error:
        raise UserError(f"runs={query!r}: MLflow at {uri} says: {error}; set uri=... if it is another store") from error
    if not found:
        raise UserError(f"runs={query!r} selects no run at {uri}; set uri=... or another filter")
    return client, found


def _every_page(client: MlflowClient, experiments: list[str], query: str) -> Iterator[MlflowRun]:
    page = client.search_runs(experiments, query, max_results=PAGE)
    yield from page
    while page.token:
        page = client.search_runs(experiments, query, max_results=PAGE, page_token=page.token)
        yield from page


def read_mlflow(client: MlflowClient, found: MlflowRun) -> Run:
    """A run whose directory is not on this machine: numbers from MLflow's history, the arm from its tags."""
    tags, params = dict(found.data.tags), dict(found.data.params)
    curves = {
        name: {int(point.step): float(point.value) for point in client.get_metric_history(found.info.run_id, name)}
        for name in found.data.metrics
    }
    ended = found.info.end_time
    return Run(
        name=str(found.info.run_name),
        arm={key: tags[key] for key in tags if not key.startswith(("mlflow.", "sweep")) and key not in NOTES},
        seed=int(tags.get("seed") or params.get("run.seed") or 0),
        status=STATUS.get(found.info.status, str(found.info.status)),
        error=tags.get("error", ""),
        seconds=(ended - found.info.start_time) / 1000 if ended else None,
        steps=max((step for curve in curves.values() for step in curve), default=None),
        curves=curves,
        config=params,
        place=int(place) if (place := params.get("sweep.place", "")).isdigit() else None,
    )
