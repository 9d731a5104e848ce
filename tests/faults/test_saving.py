"""A step's numbers, pictures and weights are one unit, wherever a run is killed, interrupted or fails."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from PIL import Image

from nai_xl import files
from nai_xl.engine import checkpoint_writer
from nai_xl.engine.checkpoint import LocalCheckpoints
from nai_xl.engine.hooks import Save
from nai_xl.errors import UserError
from nai_xl.evals.val_loss import ValLoss
from nai_xl.record import items
from nai_xl.record.journal import Journal
from nai_xl.record.progress import ProgressRecord
from nai_xl.tracker.jsonl import JsonlTracker
from nai_xl.train import train
from tests.faults.conftest import kill_me, killed, left_by

Compose = Callable[..., DictConfig]


def at_call(
    number: int, happens: Callable[..., Any], original: Callable[..., Any], file: str = ""
) -> Callable[..., Any]:
    """`original`, but `happens` instead of its call `number`, counted from 1; of calls about `file` alone."""
    calls = []

    def called(*args: Any, **given: Any) -> Any:
        if file in f"{[vars(one) if isinstance(one, Journal) else one for one in args]}":
            calls.append(args)
            if len(calls) == number:
                return happens(*args, **given)
        return original(*args, **given)

    return called


# where, and at which call: three checkpoints are saved, at steps 2, 4 and 6, each with an evaluation and a report
MOMENTS = [
    (Save, "save", 2),
    (checkpoint_writer, "_describe", 2),
    (LocalCheckpoints, "_remove_old", 3),
    (ValLoss, "run", 3),
    (items, "write_items", 2),
    (files.Path, "replace", 9),
    (JsonlTracker, "log", 4),
    (ProgressRecord, "reported", 3),
    (ProgressRecord, "delivered", 1),
]


@pytest.mark.parametrize(("place", "name", "call"), MOMENTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_run_killed_at_any_moment_is_completed_by_the_same_command(
    hurt: Compose, undisturbed: dict[str, Any], place: Any, name: str, call: int
) -> None:
    def dies() -> None:
        setattr(place, name, at_call(call, kill_me, getattr(place, name)))
        train(hurt("output_dir=killed"), {})

    assert killed(dies) == -signal.SIGKILL
    assert left_by(train(hurt("output_dir=killed"), {})) == undisturbed


def test_a_run_interrupted_twice_during_an_evaluation_is_completed_by_the_same_command(
    hurt: Compose, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*_: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ValLoss, "run", at_call(2, twice, ValLoss.run))
        train(hurt("output_dir=stopped"), {})
    (arm,) = Path("stopped").glob("*/arm.json")
    assert json.loads(arm.read_text())["status"] == "STOPPED"
    assert left_by(train(hurt("output_dir=stopped"), {})) == undisturbed


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_a_picture(image: Image.Image, path: Path, **_: Any) -> None:
    path.write_bytes(b"\x89PNG half of it")
    full()


def half_a_row(self: Journal, **row: Any) -> None:
    """The disk takes the row, and cannot keep it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        Journal(self.path).append(**row)


FULL = [
    ("metrics.jsonl", Journal, "append", 4, half_a_row),
    ("val__loss.jsonl", Journal, "append", 2, half_a_row),
    ("step_00000004.png", Image.Image, "save", 1, half_a_picture),
    ("pipeline", files, "sync_tree", 1, full),
]


@pytest.mark.parametrize(("file", "place", "name", "call", "happens"), FULL)
def test_a_disk_that_is_full_is_told_in_a_line_that_names_the_file(
    hurt: Compose,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    place: Any,
    name: str,
    call: int,
    happens: Callable[..., Any],
) -> None:
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"cannot write .*{file} .*No space left.*Free"):
        patch.setattr(place, name, at_call(call, happens, getattr(place, name), file))
        train(hurt("output_dir=full"), {})
    (arm,) = Path("full").glob("*/arm.json")
    assert json.loads(arm.read_text())["status"] == "FAILED"
    assert left_by(train(hurt("output_dir=full"), {})) == undisturbed
