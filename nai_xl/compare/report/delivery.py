"""The report in MLflow, beside the runs that it compares."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nai_xl.compare.comparison import Comparison
from nai_xl.errors import UserError
from nai_xl.tracker.mlflow.delivery import Progress
from nai_xl.tracker.mlflow.sweep import log_summary


def log(found: Comparison, files: Sequence[Path]) -> str:
    """Put the report where the arms are in MLflow. Returns one line on the outcome, or '' if they are not in MLflow."""
    paths = [run.path for arm in found.arms for run in arm.runs.values() if run.path is not None]
    sent = next((progress for path in paths if (progress := Progress.read(path)) is not None and progress.run_id), None)
    if sent is None:
        return ""
    differences = {
        re.sub(r"[^\w\-./ :]", "_", f"{row.metric}/{found.names[row.arm].replace(' + ', ' ')}"): row.effect.difference
        for row in found.rows
        if row.effect
    }
    asked = found.asked
    try:
        page = log_summary(asked.name, asked.question, files, differences, uri=sent.uri, experiment=sent.experiment)
    except UserError as error:
        return f"not in MLflow: {error}"
    return f"MLflow: {page}"
