"""The view of a sweep on MLflow's pages: which runs, columns and charts they show, in which order.

It is what the pages keep when a person shares a view, in a tag of the experiment. The pages add the charts that are
not named here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nai_xl.record.journal import metrics_of, outbox_of
from nai_xl.tracker.mlflow.words import member_tag

PICTURES = "Model metrics"  # the pages' own group of charts, where pictures are
CHOICES = "choices against results"


def view_tag(sweep: str) -> str:
    return f"mlflow.sharedViewState.{sweep}"


def view(sweep: str, keys: Sequence[str], metrics: Sequence[str], shared: Sequence[str]) -> str:
    """The view before the arms start, with the varied `keys` and the compared `metrics` first; without any, there is
    no chart of choices against results. `shared`: the keys that every arm has.
    """
    columns = ["attributes.`Duration`", *(f"params.`{key}`" for key in dict.fromkeys([*keys, "run.seed"]))]
    content = {
        "searchFilter": f"tags.`{member_tag(sweep)}` = 'arm'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "selectedColumns": [*columns, *(f"metrics.`{name}`" for name in metrics)],
        "runsHiddenMode": "SHOW_ALL",  # without it, charts leave out every arm after the tenth
        "compareRunCharts": [*([_choices(shared, metrics)] if metrics else []), *map(_pictures, ("samples", "method"))],
        "compareRunSections": _groups(metrics),
        "isAccordionReordered": True,  # else the groups are sorted by name
    }
    return json.dumps(content)


def _groups(metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The groups of charts: those of the compared metrics before the others; perf is folded up."""
    own = (name.rpartition("/")[0] for name in metrics if "/" in name)
    heights = {CHOICES: 420, PICTURES: 700}  # of the charts that take the whole width
    return [
        {
            "uuid": name,
            "name": name,
            "display": name != "perf",
            "isReordered": False,
            "deleted": False,
            **({"columns": 1, "cardHeight": heights[name]} if name in heights else {}),
        }
        for name in dict.fromkeys([CHOICES, *own, PICTURES, "train", "perf"])
    ]


def _choices(keys: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Parallel coordinates of these keys and metrics; MLflow's own chart has the first three params by name.

    A run that lacks one of the keys or metrics is left out by MLflow. The last axis colours the lines: it is the
    metric that was named first.
    """
    card = {"type": "PARALLEL", "uuid": CHOICES, "metricSectionId": CHOICES, "deleted": False, "isGenerated": True}
    return {**card, "selectedParams": list(keys), "selectedMetrics": [*reversed(metrics)], "showAllRuns": True}


def _pictures(name: str) -> dict[str, Any]:
    """A chart of the arms' pictures side by side, without all the params that MLflow would write above each."""
    card = {"type": "IMAGE", "uuid": name, "metricSectionId": PICTURES, "imageKeys": [name], "step": 0}
    return {**card, "showRunParams": False, "deleted": False, "isGenerated": True}


def fitted(stored: str, run_dirs: Sequence[Path]) -> str:
    """The stored view, changed to show what all arms have.

    Pictures are of the last step at which every arm has painted; MLflow opens at step 0, which has no samples. Metrics
    are those of every arm that has any of the compared ones.
    """
    content = json.loads(stored)
    measured = [{name for row in metrics_of(run_dir).rows() for name in row} for run_dir in run_dirs]
    for card in content["compareRunCharts"]:
        if card["type"] == "PARALLEL":
            asked = set(card["selectedMetrics"])
            common = asked.intersection(*(names for names in measured if names & asked))
            card["selectedMetrics"] = [name for name in card["selectedMetrics"] if name in common]
        else:
            painted = [_steps(run_dir, card["imageKeys"][0]) for run_dir in run_dirs]
            card["step"] = max(set.intersection(*filter(None, painted)) if any(painted) else (), default=0)
    return json.dumps(content)


def _steps(run_dir: Path, name: str) -> set[int]:
    """The steps at which this run has painted the picture `name`."""
    rows = outbox_of(run_dir).rows()
    return {int(row["step"]) for row in rows if row["kind"] == "figure" and row["name"] == name}
