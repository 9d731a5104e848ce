"""The MLflow store after a run: what is there, once, also when the run was resumed or the store was away."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from omegaconf import DictConfig
from PIL import Image

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.tracker.jsonl import JsonlTracker
from nai_xl.tracker.mlflow import delivery as mlflow_delivery
from nai_xl.tracker.mlflow.delivery import Delivery, Progress
from nai_xl.tracker.mlflow.tracker import MlflowTracker
from nai_xl.train import train

Compose = Callable[..., DictConfig]
EVERYTHING = 10**9  # more than any test waits for


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database that MLflow has made, which takes it seconds."""
    folder = tmp_path_factory.mktemp("store")
    client(folder).search_experiments()
    return folder


@pytest.fixture
def folder(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty run directory in a working directory of the test's own, which has a copy of `database`."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(database / "mlflow.db", tmp_path)
    path = tmp_path / "outputs" / "one"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts."""
    monkeypatch.setattr("nai_xl.tracker.mlflow.tracker.FIRST_DELAY", 0.05)
    monkeypatch.setattr("nai_xl.tracker.mlflow.tracker.LAST_DELAY", 0.05)


def client(folder: Path, name: str = "mlflow.db") -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{folder / name}")


def sent_run(folder: Path) -> str:
    progress = Progress.read(folder)
    assert progress
    return progress.run_id


def history(store: MlflowClient, run_id: str, name: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in store.get_metric_history(run_id, name))


def pictures(store: MlflowClient, run_id: str) -> list[str]:
    return sorted(item.path for item in store.list_artifacts(run_id, "images"))


def until(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# --- whole runs -------------------------------------------------------------------------------------------------------


def run(cfg: DictConfig) -> Path:
    return train(cfg, {"schedule": "ztsnr", "loss": "minsnr"})


def test_a_run_and_its_continuation_are_one_run_with_every_value_once(small: Compose, tmp_path: Path) -> None:
    folder = run(small("tracker=mlflow", "run.max_images=4"))
    run(small("tracker=mlflow", "run.max_images=8"))
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = mlflow.search_runs(experiment_names=["nai_xl"])
    assert len(found) == 1 and found.status[0] == "FINISHED"
    row = found.iloc[0]
    wanted = {"schedule": "ztsnr", "loss": "minsnr", "optimizer.lr": "0.001", "run.seed": "0"}
    assert {name: row[f"params.{name}"] for name in wanted} == wanted
    assert row["params.data_fingerprint"] and row["tags.mlflow.source.git.commit"]
    shown = {name for name in found.columns if name.startswith("tags.") and not name.startswith("tags.mlflow.")}
    assert shown == {"tags.seed"}
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["train/loss"]) for line in written]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert history(client(tmp_path), row.run_id) == losses
    artifacts = {item.path for item in client(tmp_path).list_artifacts(row.run_id)}
    assert {"config.yaml", "images"} <= artifacts and any(name.endswith(".png") for name in artifacts)
    assert any("samples+step+2" in name for name in pictures(client(tmp_path), row.run_id))


def test_a_run_outside_of_sweeps_is_called_as_its_directory(folder: Path, tmp_path: Path) -> None:
    (folder / "arm.json").write_text(json.dumps({"sweep": None, "arm": {}, "seed": 3, "status": "RUNNING"}))
    with MlflowTracker(folder):
        pass
    assert client(tmp_path).get_run(sent_run(folder)).info.run_name == "one"


def test_an_arm_has_a_short_name_and_few_tags(folder: Path, tmp_path: Path) -> None:
    arm = {"schedule": "ztsnr", "memory": "[sdpa,offload]", "optimizer.lr": "0.001"}
    (folder / "arm.json").write_text(json.dumps({"sweep": "ends", "arm": arm, "seed": 3}))
    with MlflowTracker(folder) as tracker:
        tracker.params({"schedule": "ztsnr", "run.seed": 3, "optimizer.lr": 0.001}, {"seed": "3"})
    found = client(tmp_path).get_run(sent_run(folder))
    assert found.info.run_name == "ztsnr sdpa+offload lr=0.001 s3"
    shown = {key: value for key, value in found.data.tags.items() if not key.startswith("mlflow.")}
    assert shown == {**arm, "sweep": "ends", "seed": "3"}


# --- exactly once -----------------------------------------------------------------------------------------------------


def report(tracker: JsonlTracker, step: int) -> None:
    tracker.log(step, {"train/loss": step / 3})
    if step % 2 == 0:
        tracker.figure("samples", step, Image.new("RGB", (400, 300), "red"))


def arrived(store: MlflowClient, run_id: str, steps: int) -> None:
    """Everything that `report` told of these steps is there, once."""
    assert history(store, run_id) == [(step, step / 3) for step in range(1, steps + 1)]
    names = [name for name in pictures(store, run_id) if name.endswith(".png")]
    assert [name.split("+timestamp+")[0] for name in names] == [
        f"images/samples+step+{step}" for step in sorted(range(2, steps + 1, 2), key=str)
    ]


CALLS = ("log_batch", "log_artifact", "update_run", "set_terminated", "get_run", "create_run")


class Flaky:
    """A client whose calls fail as told, before the store has done its work (-1), after it (+1), or not at all (0)."""

    def __init__(self, real: MlflowClient, failures: Iterator[int]):
        self.real, self.failures = real, failures

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.real, name)
        if name not in CALLS:
            return method

        def call(*given: Any, **named: Any) -> Any:
            failure = next(self.failures, 0)
            if failure < 0:
                raise MlflowException("the request was lost")
            answer = method(*given, **named)
            if failure > 0:
                raise MlflowException("the answer was lost")
            return answer

        return call


def send_through_failures(database: Path, folder: Path, failures: Iterator[int], log_in: set[int]) -> None:
    """Six reports, sent after some of them and at the end, until all has gone through; then look that it has, once."""
    uri = f"sqlite:///{database / 'mlflow.db'}"
    real = mlflow_delivery.open_store

    def flaky(*given: str) -> tuple[Any, str]:
        store, experiment_id = real(*given)
        return Flaky(store, failures), experiment_id

    def attempt() -> bool:
        try:
            Delivery(folder, uri, folder.name).deliver()
        except MlflowException:
            return False
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_delivery, "open_store", flaky)
        with JsonlTracker(folder) as tracker:
            tracker.params({"a": 1, "b@c": 2}, {"seed": "0"})
            for step in range(1, 7):
                report(tracker, step)
                if step in log_in:
                    attempt()
        while not attempt():
            pass
    runs = client(database).search_runs([client(database).get_experiment_by_name(folder.name).experiment_id])
    assert len(runs) == 1 and runs[0].info.status == "FINISHED"
    assert runs[0].data.params == {"a": "1", "b_c": "2"}
    arrived(client(database), runs[0].info.run_id, 6)


@pytest.mark.parametrize("lost", [-1, 1], ids=["request", "answer"])
def test_whichever_one_call_fails_everything_arrives_once(
    database: Path, tmp_path_factory: pytest.TempPathFactory, lost: int
) -> None:
    for number in range(100):
        failures = itertools.chain([0] * number, [lost])
        send_through_failures(database, tmp_path_factory.mktemp("run"), failures, {3})
        if next(failures, None) is not None:  # there are fewer calls than that
            break
    assert 15 < number < 99


@settings(max_examples=8, deadline=None)
@given(failures=st.lists(st.sampled_from([-1, 0, 0, 1]), max_size=40), log_in=st.sets(st.integers(1, 6), max_size=6))
def test_whatever_calls_fail_everything_arrives_once(
    database: Path, tmp_path_factory: pytest.TempPathFactory, failures: list[int], log_in: set[int]
) -> None:
    send_through_failures(database, tmp_path_factory.mktemp("run"), iter(failures), log_in)


def test_a_figure_is_filed_as_mlflow_itself_files_one(folder: Path, tmp_path: Path) -> None:
    image = Image.new("RGB", (400, 300), "red")
    with MlflowTracker(folder) as tracker:
        tracker.figure("a/b", 7, image)
    store, own = client(tmp_path), sent_run(folder)
    theirs = store.create_run(store.get_run(own).info.experiment_id).info.run_id
    store.log_image(theirs, image, key="a/b", step=7)

    def kinds(run_id: str) -> list[tuple[str, str]]:
        return [(name.split("+timestamp+")[0], name[-15:]) for name in pictures(store, run_id) if name.endswith("webp")]

    assert len(pictures(store, own)) == len(pictures(store, theirs)) == 2
    assert kinds(own) == kinds(theirs) == [("images/a~b+step+7", "compressed.webp")]
    assert store.get_run(own).data.tags["mlflow.loggedImages"] == store.get_run(theirs).data.tags["mlflow.loggedImages"]


def test_two_reports_of_one_step_both_arrive(folder: Path, tmp_path: Path) -> None:
    with MlflowTracker(folder) as tracker:
        tracker.log(1, {"perf/compile_seconds": 5.0})
        until(lambda: tracker.delivery.waiting() == 0)
        tracker.log(1, {"train/loss": 0.5})
    found = client(tmp_path).get_run(sent_run(folder)).data.metrics
    assert found == {"perf/compile_seconds": 5.0, "train/loss": 0.5}


def test_values_that_mlflow_cannot_hold_keep_no_other_one_back(folder: Path, tmp_path: Path) -> None:
    with MlflowTracker(folder) as tracker:
        tracker.log(1, {"train/loss": 1.0, "train/grad_norm": float("inf"), "val/@[x]": 2.0})
    assert client(tmp_path).get_run(sent_run(folder)).data.metrics == {"train/loss": 1.0, "val/__x_": 2.0}


def test_many_values_are_sent_in_requests_of_a_size_that_mlflow_takes(folder: Path, tmp_path: Path) -> None:
    with JsonlTracker(folder) as tracker:
        tracker.log(1, {f"wide/{number}": 1.0 for number in range(2500)})
        for step in range(2, 1500):
            tracker.log(step, {"train/loss": step / 3})
    with MlflowTracker(folder):
        pass
    store = client(tmp_path)
    assert len(store.get_run(sent_run(folder)).data.metrics) == 2501
    assert history(store, sent_run(folder)) == [(step, step / 3) for step in range(2, 1500)]


def test_another_store_is_filled_from_the_run_directory_and_the_first_one_goes_on(folder: Path, tmp_path: Path) -> None:
    def session(steps: range, name: str) -> None:
        with MlflowTracker(folder, uri=f"sqlite:///{tmp_path / name}") as tracker:
            tracker.params({"a": 1}, {})
            for step in steps:
                report(tracker, step)

    session(range(1, 4), "mlflow.db")
    session(range(3, 6), "other.db")
    arrived(client(tmp_path, "other.db"), sent_run(folder), 5)
    assert client(tmp_path, "other.db").get_run(sent_run(folder)).data.params == {"a": "1"}
    session(range(6, 7), "mlflow.db")
    arrived(client(tmp_path), sent_run(folder), 6)
    assert len(client(tmp_path).search_runs(["1"])) == 1


def test_a_run_deleted_in_mlflow_is_made_anew_with_all_that_was_ever_told(folder: Path, tmp_path: Path) -> None:
    for steps in (range(1, 4), range(4, 7)):
        with MlflowTracker(folder) as tracker:
            for step in steps:
                report(tracker, step)
        first = sent_run(folder)
        if 1 in steps:
            client(tmp_path).delete_run(first)
    arrived(client(tmp_path), sent_run(folder), 6)


# --- how a run ends ---------------------------------------------------------------------------------------------------


def test_a_failed_run_says_why_until_it_is_continued(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError), MlflowTracker(folder):
        raise UserError("no more\ncoffee")
    found = client(tmp_path).get_run(sent_run(folder))
    assert found.info.status == "FAILED" and found.data.tags["error"] == "no more coffee"
    with MlflowTracker(folder):
        pass
    found = client(tmp_path).get_run(sent_run(folder))
    assert found.info.status == "FINISHED" and "error" not in found.data.tags


def test_an_interrupted_run_is_killed_not_failed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), MlflowTracker(folder):
        raise KeyboardInterrupt
    found = client(tmp_path).get_run(sent_run(folder))
    assert found.info.status == "KILLED" and "error" not in found.data.tags


# --- stores that are not there ----------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_opened_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"tracker\.uri"), MlflowTracker(folder, uri="sqlite:////proc/none/x.db"):
        pass


def test_a_store_that_another_run_has_reached_may_be_away_at_the_start(
    folder: Path, tmp_path: Path, hurried: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with MlflowTracker(folder):
        pass
    second = folder.with_name("two")
    second.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_delivery, "open_store", lambda *_: (_ for _ in ()).throw(OSError("away")))
        with MlflowTracker(second) as tracker:
            report(tracker, 1)
    told = capsys.readouterr().err
    assert told.count("MLflow does not answer") == 1 and f"nai_xl.sync {second}" in told
    with MlflowTracker(second) as tracker:
        report(tracker, 2)
    arrived(client(tmp_path), sent_run(second), 2)


def test_a_damaged_record_is_named_and_sent_once_it_is_mended(
    folder: Path, tmp_path: Path, hurried: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with MlflowTracker(folder) as tracker:
        params = folder / "params.json"
        params.write_text("{")
        tracker.outbox.append(time=0, kind="params", file=params.name)
        tracker.sender.wake()
        until(lambda: f"{params} is damaged" in capsys.readouterr().err)
        report(tracker, 1)
        params.write_text('{"params": {"a": 1}}')
        until(lambda: tracker.delivery.waiting() == 0)
    arrived(client(tmp_path), sent_run(folder), 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A tracking server on this machine that can be stopped and started again."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = f"{sys.executable} -m mlflow server --port {self.port} --workers 1 --backend-store-uri".split()
        store = [f"sqlite:///{self.folder / 'server.db'}", "--artifacts-destination", str(self.folder / "served")]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen([*command, *store], stdout=log, stderr=log, start_new_session=True)
        until(self.answers)

    def answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        until(lambda: not self.answers())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()


def test_with_the_server_away_for_the_middle_third_everything_is_there_in_the_end(
    folder: Path, server: Server, hurried: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with MlflowTracker(folder, uri=server.uri) as tracker:
        tracker.params({"a": 1}, {"seed": "0"})
        for step in range(1, 11):
            report(tracker, step)
        until(lambda: tracker.delivery.waiting() == 0)
        server.stop()
        for step in range(11, 21):
            report(tracker, step)
        until(lambda: "does not answer" in capsys.readouterr().err)
        assert tracker.delivery.waiting() > 0
        server.start()
        for step in range(21, 31):
            report(tracker, step)
    found = MlflowClient(tracking_uri=server.uri)
    arrived(found, sent_run(folder), 30)
    run = found.get_run(sent_run(folder))
    assert (run.info.status, run.data.params) == ("FINISHED", {"a": "1"})


# --- several processes ------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def test_four_arms_may_open_a_missing_database_at_once_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arm(folder: Path) -> None:
        with MlflowTracker(folder) as tracker:
            for step in range(1, 251):
                tracker.log(step, {f"m/{i}": step + i / 8 for i in range(8)})

    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "outputs" / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir(parents=True)
    arms = [FORK.Process(target=arm, args=(folder,)) for folder in folders]
    for process in arms:
        process.start()
    for process in arms:
        process.join(300)
    assert [process.exitcode for process in arms] == [0, 0, 0, 0]
    store = client(tmp_path)
    assert [item.name for item in store.search_experiments() if item.name == "nai_xl"] == ["nai_xl"]
    for folder in folders:
        for i in (0, 7):
            wanted = [(step, step + i / 8) for step in range(1, 251)]
            assert history(store, sent_run(folder), f"m/{i}") == wanted


def test_the_uri_is_an_override(tmp_path: Path) -> None:
    cfg = config.compose(["tracker.uri=http://localhost:1"])
    assert config.build(cfg.tracker, run_dir=tmp_path).delivery.uri == "http://localhost:1"
