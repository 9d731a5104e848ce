"""MLflow's store fails at the start: the run goes on, its journal keeps all, and one line says so."""

import threading
from pathlib import Path

import pytest
from filelock import FileLock

from nai_xl.errors import UserError
from nai_xl.record.metrics import last_step
from nai_xl.tracker.mlflow import tracker
from nai_xl.tracker.mlflow.store import chosen_uri, default_uri
from nai_xl.tracker.mlflow.sweep import MlflowSweep
from nai_xl.tracker.mlflow.tracker import MlflowTracker


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracker, "PATIENCE", 0.5)
    monkeypatch.chdir(tmp_path)


def fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def open_store(uri: str, experiment: str) -> None:
        raise error

    monkeypatch.setattr("nai_xl.tracker.mlflow.delivery.open_store", open_store)
    monkeypatch.setattr("nai_xl.tracker.mlflow.sweep.open_store", open_store)


def followed(capsys: pytest.CaptureFixture[str], **settings: str) -> list[str]:
    """The lines that a run of one step prints."""
    run = Path("outputs/run")
    run.mkdir(parents=True, exist_ok=True)
    with MlflowTracker(run, **settings) as following:
        following.log(1, {"train/loss": 1.0})
    assert last_step(run) == 1
    return capsys.readouterr().err.splitlines()


def test_a_damaged_database_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mlflow.db").write_bytes(bytes(range(1, 251)) * 40)
    told, lacks = followed(capsys)
    assert "outputs/run keeps every number" in told and "nai_xl.sync outputs/run" in lacks
    (line,) = MlflowSweep().begin("a", "", [], [])
    assert "\n" not in line and "the arms keep every number" in line
    assert any("nai_xl.sync outputs/run" in line for line in MlflowSweep().end([Path("outputs/run")]))


@pytest.mark.parametrize("kind", [OSError, IndexError, KeyError])
def test_nothing_that_a_store_raises_ends_a_run(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(monkeypatch, kind("no row 0 at http://anna:geheim@host"))
    told, _ = followed(capsys)
    assert "keeps every number" in told and "geheim" not in told
    assert len(MlflowSweep().begin("a", "", [], [])) == 1


def test_a_store_that_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang(uri: str, experiment: str) -> None:
        released.wait(5)
        raise OSError("away")

    released = threading.Event()
    monkeypatch.setattr(tracker, "OPENING", 0.1)
    monkeypatch.setattr("nai_xl.tracker.mlflow.delivery.open_store", hang)
    told, _ = followed(capsys)
    assert "has not answered" in told
    released.set()


def test_a_record_that_another_process_sends_for_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nai_xl.tracker.mlflow.delivery.LOCK_SECONDS", 0)
    Path("run").mkdir()
    with FileLock("run/.mlflow.lock"), pytest.raises(UserError, match=r"nai_xl\.sync most likely, is sending run"):
        MlflowTracker(Path("run"))


def test_the_environment_names_the_store(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen_uri(None) == default_uri() and MlflowTracker.described() == default_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:geheim@host")
    assert chosen_uri(None) == "http://anna:geheim@host" and chosen_uri("sqlite:///a.db") == "sqlite:///a.db"
    assert MlflowSweep().uri == "http://anna:geheim@host"
    assert MlflowTracker.described() == "http://***@host (MLFLOW_TRACKING_URI)"
    fails(monkeypatch, OSError("away"))
    assert "keeps every number" in followed(capsys)[0]  # nobody has typed it wrongly
