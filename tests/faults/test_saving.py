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
from nai_xl.errors import UserError
from nai_xl.evals.val_loss import ValLoss
from nai_xl.record.journal import Journal
from nai_xl.record.metrics import curves
from nai_xl.record.progress import ProgressRecord
from nai_xl.task.text_to_image import TextToImage
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
    (checkpoint_writer, "_describe", 2),
    (LocalCheckpoints, "_remove_old", 3),
    (ValLoss, "run", 3),
    (files.Path, "replace", 9),
    (JsonlTracker, "log", 4),
    (ProgressRecord, "reported", 3),
    (ProgressRecord, "delivered", 1),
]


@pytest.mark.parametrize(("place", "name", "call"), MOMENTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_run_killed_at_any_moment_is_completed_by_the_same_command(
    hurt: Compose,
    undisturbed: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    place: Any,
    name: str,
    call: int,
) -> None:
    def dies() -> None:
        setattr(place, name, at_call(call, kill_me, getattr(place, name)))
        train(hurt("output_dir=killed"), {})

    assert killed(dies) == -signal.SIGKILL
    assert left_by(train(hurt("output_dir=killed"), {})) == undisturbed
    assert "are lost" not in " ".join(capsys.readouterr().out.split())  # no row is missed that is still to come


def two_ctrl_c(*_: Any) -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)


def bug(*_: Any) -> None:
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("happens", "error", "status"),
    [
        (two_ctrl_c, KeyboardInterrupt, "STOPPED"),
        (bug, UserError, "FAILED"),
    ],
)
def test_a_run_that_ends_in_an_evaluation_is_completed_by_the_same_command(
    hurt: Compose,
    undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    happens: Callable[..., Any],
    error: type[BaseException],
    status: str,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(error) as raised:
        patch.setattr(ValLoss, "run", at_call(2, happens, ValLoss.run))
        train(hurt("output_dir=ended"), {})
    if error is UserError:
        assert str(raised.value).startswith("evals.val_loss failed at step 4: IndexError: list index out of range (")
    (arm,) = Path("ended").glob("*/arm.json")
    assert json.loads(arm.read_text())["status"] == status
    assert left_by(train(hurt("output_dir=ended"), {})) == undisturbed


def test_an_evaluator_that_fails_costs_no_training(hurt: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^evals\.val_loss failed at step 2"):
        patch.setattr(ValLoss, "run", bug)
        train(hurt("output_dir=ended", "run.checkpoint_every=100"), {})
    (run,) = Path("ended").iterdir()
    assert [path.name for path in sorted((run / "checkpoints").glob("step_*"))] == ["step_00000002"]
    assert not (run / "metrics.jsonl").exists() or curves(run)["train/loss"].keys() == {1}
    assert curves(train(hurt("output_dir=ended", "run.checkpoint_every=100"), {}))["train/loss"].keys() == {
        *range(1, 7)
    }


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
    ("step_00000004", checkpoint_writer, "write_tensors", 1, full),
    ("step_00000006", checkpoint_writer, "write_tensors", 1, full),
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
    words = rf"cannot write .*{file} .*No space left.*[Ff]ree"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=words):
        patch.setattr(place, name, at_call(call, happens, getattr(place, name), file))
        train(hurt("output_dir=full"), {})
    (arm,) = Path("full").glob("*/arm.json")
    assert json.loads(arm.read_text())["status"] == "FAILED"
    assert left_by(train(hurt("output_dir=full"), {})) == undisturbed


# --- which checkpoints stay -------------------------------------------------------------------------------------------


def kept(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def test_the_best_checkpoint_stays_although_no_save_was_due_at_its_step(
    hurt: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 1.5, 6: 1.25}
    monkeypatch.setattr(ValLoss, "run", lambda self, step, studio: {"val/loss": measured[step]})
    few = "evals.val_loss.every=1 run.checkpoint_every=5 run.keep_checkpoints=1 checkpoint.best=val/loss".split()
    run = train(hurt(*few), {})
    assert kept(run) == [2, 6]
    assert json.loads((run / "checkpoints" / "best.json").read_text())["step"] == 2
    measured[8] = measured[7] = 0.5
    assert train(hurt(*few, "run.max_images=16"), {}) == run
    assert kept(run) == [7, 8]


def test_every_nth_step_stays(hurt: Compose) -> None:
    few = "evals.val_loss.every=9 evals.sample_grid.every=9 run.checkpoint_every=1 run.keep_checkpoints=1".split()
    assert kept(train(hurt(*few, "checkpoint.keep_every=2"), {})) == [2, 4, 6]


@pytest.mark.parametrize("metric", ["val/loss", "train/grad_norm"])
def test_a_metric_that_nothing_measures_or_that_has_no_direction_is_refused_before_anything_is_loaded(
    small: Compose, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    monkeypatch.setattr(TextToImage, "load", bug)
    with pytest.raises(UserError, match=rf"^checkpoint\.best={metric}: .*evals=.*checkpoint\.best=null"):
        train(small(f"checkpoint.best={metric}"), {})


def test_a_metric_that_its_evaluator_does_not_report_is_refused_at_its_first_evaluation(hurt: Compose) -> None:
    words = r"checkpoint\.best=val/lost was not measured at step 2\. Set one of: .*val/loss"
    with pytest.raises(UserError, match=words):
        train(hurt("checkpoint.best=val/lost"), {})
