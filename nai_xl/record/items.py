"""What an evaluation measured on each item, so that runs can be compared item by item.

`<run>/items/<metric with / written as __>.jsonl` has one line an evaluation:
{"step": 200, "values": {"<item>": 0.5, ...}}. The same item has the same name in every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from nai_xl.record.journal import Journal
from nai_xl.record.run_dir import RunDirectory


def items_path(run_dir: Path, metric: str) -> Path:
    return RunDirectory(run_dir).items / f"{metric.replace('/', '__')}.jsonl"


def _journal(path: Path) -> Journal:
    return Journal(path, lambda row: isinstance(row.get("step"), int) and isinstance(row.get("values"), dict))


def write_items(run_dir: Path, metric: str, step: int, values: Mapping[str, float]) -> None:
    """Add one evaluation. A step that is there already is kept as it is: a run that was killed and continued evaluates
    some steps again.
    """
    journal = _journal(items_path(run_dir, metric))
    journal.path.parent.mkdir(parents=True, exist_ok=True)
    journal.mend()
    if step not in read_items(run_dir, metric):
        journal.append(step=step, values={item: float(value) for item, value in values.items()})


def read_items(run_dir: Path, metric: str) -> dict[int, dict[str, float]]:
    """step -> item -> value of every evaluation so far; of several of one step the last; {} where there was none."""
    rows = _journal(items_path(run_dir, metric)).rows()
    return {int(row["step"]): dict(row["values"]) for row in rows}


def add_items(source: Path, run_dir: Path) -> None:
    """Add all evaluations of the run directory `source` to those of `run_dir`, in place of those of the same step."""
    for path in sorted(RunDirectory(source).items.glob("*.jsonl")):
        journal = _journal(RunDirectory(run_dir).items / path.name)
        journal.path.parent.mkdir(parents=True, exist_ok=True)
        journal.mend()
        for row in _journal(path).rows():
            journal.append(**row)


def report(run_dir: Path, step: int, table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Write metric -> item -> value. Returns each metric's mean over its items, without metrics that have no item."""
    for metric, values in table.items():
        write_items(run_dir, metric, step, values)
    return {metric: mean(values.values()) for metric, values in table.items() if values}


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
