"""A sweep in MLflow: its arms are runs that carry the tag `sweep`; one further run carries the report on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nai_xl.errors import UserError, one_line
from nai_xl.record.arm import read_arm
from nai_xl.record.journal import metrics_of, note_end, now, outbox_of
from nai_xl.tracker.mlflow.delivery import Delivery, Progress, member_tag
from nai_xl.tracker.mlflow.store import compare_page, default_uri, how_to_serve, open_store, run_page, view_page

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PICTURES = "Model metrics"  # the pages' own group of charts, where pictures are
CHOICES = "choices against results"
ENDS = {"FAILED": "FAILED", "STOPPED": "KILLED"}  # words of arm.json -> words of MLflow
NOTE = "mlflow.note.content"  # MLflow's description of a run or an experiment, in Markdown
NOTE_LENGTH, METRICS_PER_REQUEST = 8000, 1000


def begin_sweep(
    sweep: str,
    question: str,
    keys: Sequence[str],
    metrics: Sequence[str],
    *,
    shared: Sequence[str] = (),
    uri: str | None = None,
    experiment: str = "nai_xl",
) -> list[str]:
    """To be called before the arms start: makes the store, adds the question to the experiment's description, and
    stores a view of this sweep that shows the varied `keys` and the compared `metrics` first; `shared` are those of
    the keys that every arm has, whatever its value. Returns lines that tell a person where to watch.

    Raises UserError when the store does not answer.
    """
    uri = uri or default_uri()
    with _answering(uri):
        client, experiment_id = open_store(uri, experiment)
        _ask(client, experiment_id, sweep, question)
        view = json.dumps(_view(sweep, keys, metrics, shared))
        client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{sweep}", view)
    serve = how_to_serve(uri)
    return [
        *([f"MLflow       {serve}   (experiment {experiment})"] if serve else []),
        f"arms         {view_page(uri, experiment_id, sweep, charts=False)}",
        f"curves       {view_page(uri, experiment_id, sweep, charts=True)}",
    ]


def compare_line(run_dirs: Iterable[Path]) -> list[str]:
    """Where MLflow compares these arms; nothing where no arm has got there."""
    arms = [progress for progress in map(Progress.read, run_dirs) if progress and progress.run_id]
    together = [arm for arm in arms if (arm.uri, arm.experiment_id) == (arms[0].uri, arms[0].experiment_id)]
    if not together:
        return []
    return [f"compare      {compare_page(arms[0].uri, arms[0].experiment_id, [arm.run_id for arm in together])}"]


def _view(sweep: str, keys: Sequence[str], metrics: Sequence[str], shared: Sequence[str]) -> dict[str, Any]:
    """What MLflow's pages keep when a person shares a view: which runs, columns and groups of charts, in which order.
    Charts that are not named here are added by the pages themselves.
    """
    columns = ["attributes.`Duration`", *(f"params.`{key}`" for key in dict.fromkeys([*keys, "run.seed"]))]
    compared = list(metrics) or ["train/loss"]
    own = (name.rpartition("/")[0] for name in compared if "/" in name)
    groups = dict.fromkeys([CHOICES, *own, PICTURES, "train", "perf"])
    heights = {CHOICES: 420, PICTURES: 700}  # of the charts that take the whole width
    return {
        "searchFilter": f"tags.`{member_tag(sweep)}` = 'arm'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "selectedColumns": [*columns, *(f"metrics.`{name}`" for name in compared)],
        "runsHiddenMode": "SHOW_ALL",  # without it, charts leave out every arm after the tenth
        "compareRunCharts": [_choices(shared, compared), *map(_pictures, ("samples", "method"))],
        "compareRunSections": [
            {
                "uuid": name,
                "name": name,
                "display": name != "perf",  # perf is there, folded up
                "isReordered": False,
                "deleted": False,
                **({"columns": 1, "cardHeight": heights[name]} if name in heights else {}),
            }
            for name in groups
        ],
        "isAccordionReordered": True,  # else the groups are sorted by name
    }


def _choices(keys: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Parallel coordinates of what was varied and is compared; MLflow alone takes the first three params by name.
    It leaves out a run that lacks one of them, or a metric. The last axis gives the lines their colour: the metric that
    was named first.
    """
    card = {"type": "PARALLEL", "uuid": CHOICES, "metricSectionId": CHOICES, "deleted": False, "isGenerated": True}
    return {**card, "selectedParams": list(keys), "selectedMetrics": [*reversed(metrics)], "showAllRuns": True}


def _pictures(name: str) -> dict[str, Any]:
    """A chart of the arms' pictures side by side, without all the params that MLflow would write above each."""
    card = {"type": "IMAGE", "uuid": name, "metricSectionId": PICTURES, "imageKeys": [name], "step": 0}
    return {**card, "showRunParams": False, "deleted": False, "isGenerated": True}


def end_sweep(run_dirs: Sequence[Path], *, uri: str | None = None, experiment: str = "nai_xl") -> list[str]:
    """To be called after the arms have ended: what of them MLflow still lacks is sent, arms that could not do so
    themselves are told as failed, and arms that were trained for an earlier sweep are counted to this one, too. Returns
    lines for a person: where MLflow compares the arms, or what to do when it does not answer.
    """
    from mlflow.exceptions import MlflowException

    failed: list[str] = []
    last: Delivery | None = None
    for run_dir in run_dirs:
        known = _note_lost_end(run_dir)
        if not known:
            continue
        meant = Progress.read(run_dir)
        delivery = Delivery(
            run_dir, meant.uri if meant else uri or default_uri(), meant.experiment if meant else experiment
        )
        try:
            delivery.open()
            delivery.deliver()
            last = delivery
        except (MlflowException, OSError):
            failed.append(str(run_dir))
    if last and (arm := read_arm(last.run_dir)) and arm.sweep:
        with suppress(MlflowException, OSError):  # a matter of looks
            _fit_view(last, arm.sweep, run_dirs)
    lines = compare_line(run_dirs)
    if failed:
        lines.append(f"MLflow does not answer; when it does: python -m nai_xl.sync {' '.join(failed)}")
    return lines


def _fit_view(delivery: Delivery, sweep: str, run_dirs: Sequence[Path]) -> None:
    """Let the sweep's view show what all arms have: pictures of the last step at which every arm has painted (MLflow
    itself opens at step 0, where samples have none), and metrics that every arm has which has any of them.
    """
    if delivery.client is None:
        return
    experiment_id, key = delivery.progress.experiment_id, f"mlflow.sharedViewState.{sweep}"
    stored = delivery.client.get_experiment(experiment_id).tags.get(key)
    if not stored:
        return
    view = json.loads(stored)
    measured = [{name for row in metrics_of(run_dir).rows() for name in row} for run_dir in run_dirs]
    for card in view["compareRunCharts"]:
        if card["type"] == "PARALLEL":
            asked = set(card["selectedMetrics"])
            common = asked.intersection(*(names for names in measured if names & asked))
            card["selectedMetrics"] = [name for name in card["selectedMetrics"] if name in common]
        else:
            painted = [_steps(run_dir, card["imageKeys"][0]) for run_dir in run_dirs]
            card["step"] = max(set.intersection(*filter(None, painted)) if any(painted) else (), default=0)
    delivery.client.set_experiment_tag(experiment_id, key, json.dumps(view))


def _steps(run_dir: Path, name: str) -> set[int]:
    rows = outbox_of(run_dir).rows()
    return {int(row["step"]) for row in rows if row["kind"] == "figure" and row["name"] == name}


def _note_lost_end(run_dir: Path) -> bool:
    """Bring into an arm's record what arm.json alone knows: that it failed or was killed. False for one that never
    began and did not fail.
    """
    statuses = [row["status"] for row in outbox_of(run_dir).rows() if row["kind"] == "status"]
    arm = read_arm(run_dir)
    if arm and arm.status in ENDS and (statuses[-1] if statuses else "RUNNING") == "RUNNING":
        if not statuses and arm.status == "STOPPED":
            return False
        note_end(run_dir, ENDS[arm.status], arm.error or "")
        return True
    return bool(statuses)


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
    uri = uri or default_uri()
    with _answering(uri):
        client, experiment_id = open_store(uri, experiment)
        run = _summary(client, experiment_id, sweep)
        run_id = str(run.info.run_id)
        client.set_tag(run_id, NOTE, _description(question, files), synchronous=True)
        for path in files:
            client.log_artifact(run_id, str(path))
        _set_metrics(client, run, metrics)
        client.set_terminated(run_id)
        _ask(client, experiment_id, sweep, question)
    return run_page(uri, experiment_id, run_id)


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise UserError(f"the MLflow store {uri} does not answer ({one_line(error)}). Set tracker.uri=...") from error


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
