"""A store of MLflow: how to open it, safely in several processes at once, and the addresses of its pages."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from filelock import FileLock

from nai_xl.errors import UserError
from nai_xl.redact import HIDDEN, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
VARIABLE = "MLFLOW_TRACKING_URI"
LOCK_SECONDS = 60
UI = "http://127.0.0.1:5000"  # where a plain `mlflow ui` serves
# MLflow's pages open as those for language models until a person switches. Neither the database nor the tag
# mlflow.experimentKind decides that, only this part of the address, or the switch that the browser remembers.
KIND = "workflowType=machine_learning"


def default_uri() -> str:
    """The SQLite file mlflow.db in the working directory, which a plain `mlflow ui` there shows."""
    path = str(Path.cwd() / "mlflow.db")
    for character in "%?#":  # which mean something else in an address
        path = path.replace(character, f"%{ord(character):02X}")
    return f"{SQLITE}{path}"


def chosen_uri(uri: str | None) -> str:
    """The store that is meant: `uri`, or else $MLFLOW_TRACKING_URI, or else the default."""
    meant = uri or os.environ.get(VARIABLE) or default_uri()
    return f"{SQLITE}{Path(meant.removeprefix(SQLITE)).expanduser()}" if meant.startswith(f"{SQLITE}~") else meant


def refuses(uri: str | None) -> bool:
    """Whether a store that cannot be opened ends a run at its start, if it has never answered: a typed address may be
    mistyped. That of a SQLite file is right where its folder is.
    """
    return uri is not None and not (uri.startswith(SQLITE) and _database(chosen_uri(uri)).parent.is_dir())


def with_login(uri: str) -> str:
    """An address as a record has it, with the user and password that no record keeps. Raises UserError without them."""
    if HIDDEN not in uri:
        return uri
    given = os.environ.get(VARIABLE, "")
    if redacted(given) == uri:
        return given
    if os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return uri.replace(f"{HIDDEN}@", "")
    raise UserError(
        f"{uri} asks for a user and password, which no record keeps: set {VARIABLE}, or MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or give --uri to nai_xl.sync"
    )


def failures() -> tuple[type[Exception], ...]:
    """What MLflow raises when a store fails: its own errors, and those of the libraries below it that it lets through.

    IndexError, KeyError: of a store whose tables lack rows that MLflow takes for granted. UserError: of an address
    without its login.
    """
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, CommandError, OSError, IndexError, KeyError, UserError


def open_store(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """A client of the store, and the id of `experiment`, which is created if missing.

    Raises one of `failures` when the store does not answer.
    """
    # without this location, MLflow would look for artifacts in the working directory of whoever reads them
    location = (_database(uri).parent / "mlruns").as_uri() if uri.startswith(SQLITE) else None
    with opened(uri) as client:
        return client, _experiment_id(client, experiment, location)


@contextmanager
def opened(uri: str) -> Iterator[MlflowClient]:
    """A client of the store, to be used inside the block for the first time and afterwards as long as it is needed.

    Several processes that open a missing database at once would corrupt its first migration, or create an experiment
    twice, so they take turns at the block. Raises what open_store raises.
    """
    from mlflow import MlflowClient

    _quiet()
    uri = with_login(uri)
    if not uri.startswith(SQLITE):
        yield MlflowClient(tracking_uri=uri)
        return
    database = _database(uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock", timeout=LOCK_SECONDS):
        yield MlflowClient(tracking_uri=uri)


def _database(uri: str) -> Path:
    return Path(unquote(uri.removeprefix(SQLITE)))


def _experiment_id(client: MlflowClient, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        # tells MLflow and readers of its tables that the runs train a model
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(name, artifact_location=location, tags=kind))
    except MlflowException as error:
        if error.error_code == "RESOURCE_ALREADY_EXISTS" and (found := client.get_experiment_by_name(name)):
            return str(found.experiment_id)  # another arm was faster
        raise


def _quiet() -> None:
    """Keep MLflow from logging every database migration, and from trying a dead server for minutes."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


# --- addresses --------------------------------------------------------------------------------------------------------


def how_to_serve(uri: str) -> str:
    """The command that serves the pages below; "" for a store that is a server already."""
    if uri.startswith("http"):
        return ""
    return "mlflow ui" if uri == default_uri() else f"mlflow ui --backend-store-uri {redacted(uri)}"


def _page(uri: str) -> str:
    page = redacted(uri).replace(f"{HIDDEN}@", "")  # a browser asks for the login
    return f"{page.rstrip('/') if uri.startswith('http') else UI}/#"


def run_page(uri: str, experiment_id: str, run_id: str) -> str:
    return f"{_page(uri)}/experiments/{experiment_id}/runs/{run_id}?{KIND}"


def view_page(uri: str, experiment_id: str, view: str, *, charts: bool) -> str:
    """The table of runs, or with `charts` their curves and pictures, arranged by the view of this name."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"{_page(uri)}/experiments/{experiment_id}/runs?{KIND}{mode}&viewStateShareKey={quote(view, safe='')}"


def compare_page(uri: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Runs side by side: their params, last values, and plots of one against another."""
    runs = quote(json.dumps(list(run_ids), separators=(",", ":")), safe="")
    experiments = quote(json.dumps([experiment_id]), safe="")
    # this page does not find `runs` unless it comes first
    return f"{_page(uri)}/compare-runs?runs={runs}&experiments={experiments}&{KIND}"
