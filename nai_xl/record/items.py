"""What an evaluation measured on each item, so that runs can be compared item by item.

`<run>/items/<metric with / written as __>.jsonl` holds one line an evaluation:
{"step": 200, "values": {"<item>": 0.5, ...}}. The same item has the same name in every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def items_path(run_dir: Path, metric: str) -> Path:
    return run_dir / "items" / f"{metric.replace('/', '__')}.jsonl"


def write_items(run_dir: Path, metric: str, step: int, values: Mapping[str, float]) -> None:
    """Add one evaluation. A step that is there already stays as it is, as in metrics.jsonl: a run that was killed and
    continued evaluates some steps again.
    """
    if step in read_items(run_dir, metric):
        return
    path = items_path(run_dir, metric)
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # by a crash; else it would spoil this line too
    line = json.dumps({"step": step, "values": {item: float(value) for item, value in values.items()}})
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + line + "\n")


def read_items(run_dir: Path, metric: str) -> dict[int, dict[str, float]]:
    """step -> item -> value of every evaluation so far; nothing if there was none. Torn lines are left out."""
    path = items_path(run_dir, metric)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(filter(None, map(_row, lines)))


def _row(line: str) -> tuple[int, dict[str, float]] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return int(row["step"]), dict(row["values"])


def report(run_dir: Path, step: int, table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Write metric -> item -> value, and give each metric's mean over its items. A metric without items is left out."""
    for metric, values in table.items():
        write_items(run_dir, metric, step, values)
    return {metric: mean(values.values()) for metric, values in table.items() if values}


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
