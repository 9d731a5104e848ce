"""Runs read from their directories."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nai_xl.compare.runs.naming import word
from nai_xl.compare.runs.run import Run
from nai_xl.errors import UserError


def read_directory(path: Path, config: Mapping[str, Any], sweep: str = "") -> Run:
    """The run in `path` as an arm of `sweep`. `config` is its flattened config.

    Without a sweep, it is an arm of the last one it was trained for; outside of any sweep it has no swept keys. Raises
    UserError when there is no run.
    """
    note = path / "arm.json"
    if not note.is_file() and not (path / "metrics.jsonl").is_file():
        raise UserError(
            f"{path} holds neither arm.json nor metrics.jsonl: name a run's directory, such as outputs/NAME"
        )
    try:
        arm = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        choices = (arm.get("sweeps") or {}).get(sweep, arm.get("arm") or {})
    except json.JSONDecodeError as error:
        raise UserError(f"{note} is not JSON ({error}); train that arm again, or leave {path} out") from error
    curves: dict[str, dict[int, float]] = {}
    for row in json_lines(path / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                curves.setdefault(name, {})[int(row["step"])] = float(value)
    return Run(
        name=path.name,
        arm={key: word(value) for key, value in choices.items()},
        seed=int(arm.get("seed", config.get("run.seed", 0))),
        status=str(arm.get("status", "FINISHED")),
        error=str(arm.get("error") or ""),
        seconds=arm.get("seconds"),
        steps=arm.get("steps") or max((step for curve in curves.values() for step in curve), default=None),
        images=arm.get("images"),
        curves=curves,
        config=config,
        path=path,
    )


def sweep_directories(output_dir: Path, sweep: str) -> list[Path]:
    """The run directories under `output_dir` that belong to `sweep`, the newest last.

    Raises UserError, with the names of the sweeps that are there, when there is none of that name.
    """
    found: dict[str, list[Path]] = {}
    for note in sorted(output_dir.glob("*/arm.json"), key=lambda path: (path.stat().st_mtime, path)):
        try:
            arm = json.loads(note.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{note} is not JSON ({error}); train that arm again, or remove the file") from error
        for name in dict.fromkeys(filter(None, [arm.get("sweep"), *(arm.get("sweeps") or {})])):
            found.setdefault(name, []).append(note.parent)
    if sweep not in found:
        there = f"there is {', '.join(sorted(found))}" if found else "no arms of any sweep lie there"
        raise UserError(
            f"no run of sweep {sweep} in {output_dir}; {there}. Train it with python -m nai_xl.train -m, or set "
            "output_dir=DIR"
        )
    return found[sweep]


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; a line cut short by a crash is left out, and a missing file has none."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue
