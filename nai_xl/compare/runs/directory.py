"""Runs read from their directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nai_xl.compare.runs.naming import word
from nai_xl.compare.runs.run import Run
from nai_xl.errors import UserError
from nai_xl.record.arm import Arm, read_arm
from nai_xl.record.metrics import curves
from nai_xl.record.run_dir import RunDirectory


def read_directory(path: Path, config: Mapping[str, Any], sweep: str = "") -> Run:
    """The run in `path` as an arm of `sweep`. `config` is its flattened config.

    Without a sweep, it is an arm of the last one it was trained for; outside of any sweep it has no swept keys. Raises
    UserError when there is no run, or its arm.json is damaged.
    """
    noted = read_arm(path)
    if noted is None and not RunDirectory(path).metrics.is_file():
        raise UserError(
            f"{path} holds neither arm.json nor metrics.jsonl: name a run's directory, such as outputs/NAME"
        )
    measured = curves(path)
    # a run may be older than arm.json
    arm = noted or Arm(seed=int(config.get("run.seed", 0)), status="FINISHED")
    return Run(
        name=path.name,
        arm={key: word(value) for key, value in arm.sweeps.get(sweep, arm.arm).items()},
        seed=arm.seed,
        status=arm.status,
        error=arm.error or "",
        seconds=arm.seconds or None,  # 0: not noted before the run's end
        steps=arm.steps or max((step for curve in measured.values() for step in curve), default=None),
        images=arm.images or None,
        curves=measured,
        config=config,
        path=path,
        place=arm.places.get(sweep or arm.sweep or ""),
    )


def sweep_directories(output_dir: Path, sweep: str) -> list[Path]:
    """The run directories under `output_dir` that belong to `sweep`, the newest last.

    Raises UserError when there is none, with the names of the sweeps that are there, or when an arm.json is damaged.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(output_dir.glob("*/arm.json"), key=lambda path: (path.stat().st_mtime, path)):
        if (arm := read_arm(file.parent)) is not None:
            for name in dict.fromkeys(filter(None, [arm.sweep, *arm.sweeps])):
                found.setdefault(name, []).append(file.parent)
    if sweep not in found:
        there = f"there is {', '.join(sorted(found))}" if found else "no arms of any sweep lie there"
        raise UserError(
            f"no run of sweep {sweep} in {output_dir}; {there}. Train it with python -m nai_xl.train -m, or set "
            "output_dir=DIR"
        )
    return found[sweep]
