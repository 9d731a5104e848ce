"""How MLflow names what the record of a run says: metrics, and the tags of an arm of a sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nai_xl.record.arm import read_arm

if TYPE_CHECKING:
    from mlflow.entities import Metric

KEY_LENGTH, VALUE_LENGTH = 250, 6000  # characters of a name and of a param in MLflow


def arm_tags(run_dir: Path) -> dict[str, str]:
    """The tags of a run that is an arm of a sweep, {} for other runs: the sweep, the seed, the varied keys, a run name
    made of the values alone, and one tag for every sweep that the run has been an arm of.

    Raises Damaged, for arm.json.
    """
    arm = read_arm(run_dir)
    if arm is None or not arm.sweep:
        return {}
    varied = {str(key): str(value) for key, value in arm.arm.items()}
    name = " ".join([*(_short(key, value) for key, value in varied.items()), f"s{arm.seed}"])
    sweeps = dict.fromkeys(map(member_tag, [*arm.sweeps, arm.sweep]), "arm")
    return {**varied, "sweep": arm.sweep, "seed": str(arm.seed), "mlflow.runName": name, **sweeps}


def member_tag(sweep: str) -> str:
    """The tag of every arm of a sweep. An arm keeps it when it becomes an arm of another sweep. MLflow's tables do not
    show it, since it begins with `mlflow.`
    """
    return valid_name(f"mlflow.nai_xl.sweep.{sweep}")


def _short(key: str, value: str) -> str:
    """'ztsnr' for the option of a group, 'lr=0.001' for another value."""
    return f"{key.rpartition('.')[2]}={value}" if "." in key else value.strip("[]").replace(",", "+")


def valid_name(key: str) -> str:
    """A name that MLflow accepts: letters, digits and _-. :/"""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:KEY_LENGTH]


def metrics_in(row: Mapping[str, Any]) -> Iterator[Metric]:
    """The finite values of a row. MLflow reads infinity back as 1.8e308, which ruins a chart."""
    from mlflow.entities import Metric

    for name, value in row.items():
        if name not in ("step", "time") and math.isfinite(value):
            yield Metric(valid_name(name), value, int(row["time"]), int(row["step"]))
