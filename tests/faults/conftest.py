"""Runs of seconds that are hurt on purpose, and what an undisturbed one leaves."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from nai_xl.data.tensor_file import measured
from nai_xl.train import train

RUN = (
    "data.held_out=0.2 evals=[sample_grid,val_loss] evals.sample_grid.every=2 evals.val_loss.every=2 "
    "evals.val_loss.timesteps=1 evals.sample_grid.count=1 sampling.steps=1 run.max_images=12 run.checkpoint_every=2"
).split()
CLOCKED = ("time", "perf/")  # of a row, what no two runs have in common


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def left_by(run: Path) -> dict[str, Any]:
    """All that two equal runs have in common, and the names of all their files."""
    rows = [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in jsonl(run / "metrics.jsonl")]
    figures = [(row["name"], row["step"]) for row in jsonl(run / "outbox.jsonl") if row["kind"] == "figure"]
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    return {
        "rows": rows,
        "figures": sorted(figures),
        "items": {path.name: jsonl(path) for path in sorted((run / "items").iterdir())},
        "pictures": {path.name: path.read_bytes() for path in sorted((run / "samples").iterdir())},
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()),
        "status": json.loads((run / "arm.json").read_text())["status"],
        "state": {part: measured(newest / f"{part}.safetensors") for part in ("unet", "ema", "optimizer")},
    }


@pytest.fixture
def hurt(small: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """The config of a run of six steps that saves, evaluates and paints at 2, 4 and 6."""
    return lambda *overrides: small(*RUN, *overrides)


UNDISTURBED: dict[str, dict[str, Any]] = {}


@pytest.fixture
def undisturbed(hurt: Callable[..., DictConfig]) -> dict[str, Any]:
    """What a run leaves that nothing happened to; trained once in a process."""
    if not UNDISTURBED:
        UNDISTURBED["all"] = left_by(train(hurt("output_dir=undisturbed"), {}))
    return UNDISTURBED["all"]


def killed(work: Callable[[], Any]) -> int:
    """The status of a copy of this process that does `work`: -9 if it was killed."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(120)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode


def kill_me(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
