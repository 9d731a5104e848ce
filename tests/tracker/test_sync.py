"""python -m nai_xl.sync: what a store lacked is there afterwards, once."""

import json
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from nai_xl import sync
from nai_xl.record.journal import note_end
from nai_xl.tracker.jsonl import JsonlTracker
from nai_xl.tracker.mlflow.delivery import Delivery, Progress, send


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def told(folder: Path, *steps: int) -> Path:
    """A run directory with these reports and a picture, none of them sent."""
    folder.mkdir(parents=True, exist_ok=True)
    with JsonlTracker(folder) as tracker:
        tracker.params({"a": 1}, {"seed": "0"})
        for step in steps:
            tracker.log(step, {"train/loss": step / 3})
        tracker.figure("samples", steps[-1], Image.new("RGB", (8, 8)))
    return folder


def history(uri: str, folder: Path) -> list[tuple[int, float]]:
    progress = Progress.read(folder)
    assert progress
    points = MlflowClient(tracking_uri=uri).get_metric_history(progress.run_id, "train/loss")
    return sorted((point.step, point.value) for point in points)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sync", *map(str, arguments)])
    try:
        sync.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_every_run_of_a_folder_that_was_meant_for_mlflow_is_sent_once(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [told(tmp_path / name, 1, 2) for name in ("one", "two", "not meant")]
    for folder in folders[:2]:
        Delivery(folder, uri, "all")  # what a tracker leaves that never had an answer
    assert call(monkeypatch, "--all", tmp_path) == 0
    assert call(monkeypatch, "--all", tmp_path) == 0
    for folder in folders[:2]:
        assert history(uri, folder) == [(1, 1 / 3), (2, 2 / 3)]
    assert Progress.read(folders[2]) is None
    assert capsys.readouterr().out.splitlines() == [
        *(f"{folder}: 7 rows sent" for folder in folders[:2]),
        *(f"{folder}: no rows sent" for folder in folders[:2]),
    ]


def test_a_run_made_without_mlflow_is_sent_where_it_is_told(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = told(tmp_path / "one", 1)
    assert call(monkeypatch, folder) == 1
    assert "--uri" in capsys.readouterr().err
    assert call(monkeypatch, folder, "--uri", uri) == 0
    assert history(uri, folder) == [(1, 1 / 3)]


def test_the_end_of_a_killed_run_and_its_place_in_another_sweep_are_told(uri: str, tmp_path: Path) -> None:
    folder = told(tmp_path / "one", 1)
    send(folder, uri)
    note_end(folder, "FAILED", "killed by signal 9")
    (folder / "arm.json").write_text(json.dumps({"sweep": "second", "arm": {"loss": "minsnr"}, "seed": 0}))
    send(folder)
    progress = Progress.read(folder)
    assert progress
    run = MlflowClient(tracking_uri=uri).get_run(progress.run_id)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "killed by signal 9")
    assert (run.data.tags["sweep"], run.info.run_name) == ("second", "minsnr s0")


def test_one_run_that_cannot_be_sent_keeps_no_other_back(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = told(tmp_path / "bad", 1), told(tmp_path / "good", 1)
    Delivery(bad, "sqlite:////proc/none/x.db", "nai_xl")
    Delivery(good, uri, "nai_xl")
    damaged = told(tmp_path / "damaged", 1)
    Delivery(damaged, uri, "nai_xl")
    (damaged / "arm.json").write_text('{"sweep": "s"')
    assert call(monkeypatch, tmp_path / "missing", bad, damaged, good) == 1
    assert history(uri, good) == [(1, 1 / 3)]
    told_errors = capsys.readouterr().err
    assert f"error: {bad}: " in told_errors and f"error: {tmp_path / 'missing'}: no such directory" in told_errors
    assert f"error: {damaged}: {damaged / 'arm.json'} is damaged" in told_errors


def test_nothing_to_do_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch) == 2
