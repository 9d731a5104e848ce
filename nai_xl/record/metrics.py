"""What a run has measured, read from metrics.jsonl."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from omegaconf import OmegaConf

from nai_xl.record.config import read_config
from nai_xl.record.journal import metrics_of
from nai_xl.record.json_file import Damaged


def curves(run_dir: Path) -> dict[str, dict[int, float]]:
    """metric -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    for row in metrics_of(run_dir).rows():
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


def last_value(run_dir: Path, name: str) -> float | None:
    """The newest value of a metric; None where there is none."""
    values = [float(row[name]) for row in metrics_of(run_dir).rows() if name in row]
    return values[-1] if values else None


def last_step(run_dir: Path) -> int:
    """The last optimizer step that was reported; 0 where there is none."""
    return max((int(row["step"]) for row in metrics_of(run_dir).rows()), default=0)


def objective(run_dir: Path) -> float | None:
    """What a search minimises: the last val/loss, or train/loss where nothing is validated."""
    validated = last_value(run_dir, "val/loss")
    return last_value(run_dir, "train/loss") if validated is None else validated


def lost_rows(run_dir: Path, start: int, log_every: int) -> list[str]:
    """A line on numbers that are gone, for a run that goes on after step `start`: it has reported every log_every steps
    at most. [] where there are none.
    """
    stored = None
    with suppress(Damaged):  # this run writes it anew
        stored = read_config(run_dir)
    period = max(log_every, int(OmegaConf.select(stored, "run.log_every") or 0) if stored else 0)
    reported = max((step for row in metrics_of(run_dir).rows() if (step := int(row["step"])) <= start), default=0)
    if start - reported < period:
        return []
    path = metrics_of(run_dir).path
    what = "is gone" if not path.exists() else "is empty" if not reported else f"ends at step {reported}"
    return [f"{path} {what}: the numbers of steps {reported + 1} to {start} are lost; the run goes on and adds to it"]
