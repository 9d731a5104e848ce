"""What a sweep leaves in MLflow besides its arms, and the addresses it names."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow import MlflowClient
from PIL import Image

from nai_xl.errors import UserError
from nai_xl.tracker.jsonl import JsonlTracker
from nai_xl.tracker.mlflow.delivery import Progress, send
from nai_xl.tracker.mlflow.sweep import MlflowSweep, compare_line, log_summary


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def note(folder: Path, sweep: str, loss: str, status: str = "FINISHED", error: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"sweep": sweep, "arm": {"loss": loss}, "seed": 0, "status": status, "error": error}
    (folder / "arm.json").write_text(json.dumps(content))


def arm(folder: Path, uri: str, sweep: str, loss: str) -> Path:
    note(folder, sweep, loss)
    with JsonlTracker(folder) as tracker:
        tracker.params({"loss": loss, "run.seed": 0}, {"seed": "0"})
        tracker.log(1, {"val/loss": 1.0})
    send(folder, uri)
    return folder


def test_summary_is_one_run_however_often_it_is_made(uri: str, tmp_path: Path) -> None:
    report, figure = tmp_path / "report.md", tmp_path / "effects.png"
    figure.write_bytes(b"picture")
    for text, effect in (("# first", 0.5), ("# second", 0.5), ("# second", 0.25)):
        report.write_text(text)
        log_summary("ends", "Does it\nend?", [report, figure], {"effect": effect}, uri=uri, experiment="e")
    log_summary("other", "And this?", [], {}, uri=uri, experiment="e")
    store = MlflowClient(tracking_uri=uri)
    experiment = store.get_experiment_by_name("e")
    runs = store.search_runs([experiment.experiment_id], "tags.sweep_summary = 'ends'")
    assert len(runs) == 1
    run = runs[0]
    assert (run.info.run_name, run.info.status) == ("summary ends", "FINISHED")
    assert run.data.tags["mlflow.note.content"] == "# second"
    assert {item.path for item in store.list_artifacts(run.info.run_id)} == {"report.md", "effects.png"}
    assert [point.value for point in store.get_metric_history(run.info.run_id, "effect")] == [0.5, 0.25]
    described = experiment.tags["mlflow.note.content"].splitlines()
    assert described == ["- **ends**: Does it end?", "- **other**: And this?"]


def test_a_summary_keeps_no_metric_that_its_report_has_no_more(uri: str) -> None:
    for metrics in ({"val/loss/a": 1.0, "val/loss/b": 2.0}, {"val/loss/a": 3.0}):
        log_summary("fewer", "Which?", [], metrics, uri=uri, experiment="e")
    store = MlflowClient(tracking_uri=uri)
    (run,) = store.search_runs([store.get_experiment_by_name("e").experiment_id], "tags.sweep_summary = 'fewer'")
    assert run.data.metrics == {"val/loss/a": 3.0}


def test_report_too_long_for_a_description_leaves_the_question_there(uri: str, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    report.write_text("long " * 2000)
    log_summary("long", "Is it long?", [report], {}, uri=uri, experiment="e")
    store = MlflowClient(tracking_uri=uri)
    runs = store.search_runs([store.get_experiment_by_name("e").experiment_id], "tags.sweep_summary = 'long'")
    assert runs[0].data.tags["mlflow.note.content"] == "Is it long?"


def test_summary_for_a_store_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not answer .*; python -m nai_xl\.sync RUN_DIR --uri="):
        log_summary("a", "b", [], {}, uri="sqlite:////proc/none/x.db")


def test_the_view_of_a_sweep_finds_its_arms_and_columns_that_they_have(uri: str, tmp_path: Path) -> None:
    lines = MlflowSweep(uri=uri).begin("losses", "Which loss?", ["loss"], ["val/loss"])
    folders = [arm(tmp_path / loss, uri, "losses", loss) for loss in ("uniform", "minsnr")]
    arm(tmp_path / "else", uri, "another", "uniform")
    assert f"mlflow ui --backend-store-uri {uri}" in lines[0]
    store = MlflowClient(tracking_uri=uri)
    experiment = store.get_experiment_by_name("nai_xl")
    assert experiment.tags["mlflow.note.content"] == "- **losses**: Which loss?"
    for line in lines[1:]:
        _, path, query = split(line)
        assert path == f"/experiments/{experiment.experiment_id}/runs"
        view = json.loads(experiment.tags[f"mlflow.sharedViewState.{query['viewStateShareKey'][0]}"])
    found = store.search_runs([experiment.experiment_id], view["searchFilter"])
    assert sorted(run.info.run_id for run in found) == sorted(map(run_id, folders))
    for run in found:
        own = {f"params.`{key}`" for key in run.data.params} | {f"metrics.`{key}`" for key in run.data.metrics}
        assert own == set(view["selectedColumns"]) - {"attributes.`Duration`"}
    groups = [group["name"] for group in view["compareRunSections"]]
    assert groups == ["choices against results", "val", "Model metrics", "train", "perf"]
    assert {card["metricSectionId"] for card in view["compareRunCharts"]} <= set(groups)


def test_a_sweep_whose_store_is_not_there_names_the_override() -> None:
    with pytest.raises(UserError, match=r"tracker\.uri"):
        MlflowSweep(uri="sqlite:////proc/none/x.db").begin("a", "b", [], [])


def test_an_arm_of_two_sweeps_is_found_in_both(uri: str, tmp_path: Path) -> None:
    MlflowSweep(uri=uri).begin("first", "", ["loss"], [])
    shared = arm(tmp_path / "shared", uri, "first", "uniform")
    MlflowSweep(uri=uri).begin("second", "", ["loss"], [])
    content = json.loads((shared / "arm.json").read_text())
    sweeps = {"first": content["arm"], "second": content["arm"]}
    (shared / "arm.json").write_text(json.dumps(content | {"sweep": "second", "sweeps": sweeps}))
    MlflowSweep().end([shared])
    experiment = MlflowClient(tracking_uri=uri).get_experiment_by_name("nai_xl")
    for sweep in ("first", "second"):
        view = json.loads(experiment.tags[f"mlflow.sharedViewState.{sweep}"])
        found = MlflowClient(tracking_uri=uri).search_runs([experiment.experiment_id], view["searchFilter"])
        assert [run.info.run_id for run in found] == [run_id(shared)]


def test_the_view_opens_at_the_last_step_at_which_all_arms_have_pictures(uri: str, tmp_path: Path) -> None:
    MlflowSweep(uri=uri).begin("painted", "", ["loss"], [])
    folders = [arm(tmp_path / loss, uri, "painted", loss) for loss in ("uniform", "minsnr", "edm")]
    for folder, steps in zip(folders, ((10, 20, 30), (10, 20), ()), strict=True):
        for step in steps:
            JsonlTracker(folder).figure("samples", step, Image.new("RGB", (8, 8)))
    MlflowSweep().end(folders)
    tags = MlflowClient(tracking_uri=uri).get_experiment_by_name("nai_xl").tags
    cards = json.loads(tags["mlflow.sharedViewState.painted"])["compareRunCharts"]
    pictures = [card for card in cards if card["type"] == "IMAGE"]
    assert [(card["imageKeys"], card["step"]) for card in pictures] == [(["samples"], 20), (["method"], 0)]


def test_parallel_coordinates_have_the_params_and_metrics_that_are_in_all_arms(uri: str, tmp_path: Path) -> None:
    """MLflow leaves out a run that lacks one of them."""

    def chart() -> dict[str, Any]:
        tags = MlflowClient(tracking_uri=uri).get_experiment_by_name("nai_xl").tags
        cards = json.loads(tags["mlflow.sharedViewState.gammas"])["compareRunCharts"]
        return next(card for card in cards if card["type"] == "PARALLEL")

    metrics = ["val/loss", "val/x0_loss"]
    MlflowSweep(uri=uri).begin("gammas", "", ["loss", "loss.gamma", "run.seed"], metrics, shared=["loss"])
    assert (chart()["selectedParams"], chart()["selectedMetrics"]) == (["loss"], ["val/x0_loss", "val/loss"])
    MlflowSweep().end([arm(tmp_path / loss, uri, "gammas", loss) for loss in ("uniform", "minsnr")])
    assert (chart()["selectedParams"], chart()["selectedMetrics"]) == (["loss"], ["val/loss"])


def test_arms_that_could_not_tell_how_they_ended_are_told_once(uri: str, tmp_path: Path) -> None:
    killed, never, stopped = (tmp_path / name for name in ("killed", "never", "stopped"))
    note(killed, "lost", "uniform")
    JsonlTracker(killed).__enter__()
    send(killed, uri)
    for folder in (killed, never):
        note(folder, "lost", "uniform", "FAILED", "killed by signal 9")
    note(stopped, "lost", "uniform", "STOPPED")
    for _ in range(2):
        (line,) = MlflowSweep(uri=uri).end([killed, never, stopped])
    assert json.loads(split(line)[2]["runs"][0]) == [run_id(killed), run_id(never)]
    for folder in (killed, never):
        run = MlflowClient(tracking_uri=uri).get_run(run_id(folder))
        assert (run.info.status, run.data.tags["error"]) == ("FAILED", "killed by signal 9")
        assert [row["status"] for row in JsonlTracker(folder).outbox.rows()].count("FAILED") == 1
    assert Progress.read(stopped) is None


def test_end_of_a_sweep_with_the_store_away_names_the_way_to_send_it_later(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    note(folder, "lost", "uniform", "FAILED", "why")
    lines = MlflowSweep(uri="sqlite:////proc/none/x.db").end([folder])
    assert lines == [f"MLflow does not answer; when it does: python -m nai_xl.sync {folder}"]


def test_an_arm_whose_record_is_damaged_is_named_and_keeps_no_other_one_back(uri: str, tmp_path: Path) -> None:
    folders = [arm(tmp_path / loss, uri, "damage", loss) for loss in ("uniform", "minsnr")]
    (folders[0] / "arm.json").write_text("{")
    note(folders[1], "damage", "minsnr", "FAILED", "why")
    JsonlTracker(folders[1]).__enter__()
    line, error = MlflowSweep(uri=uri).end(folders)
    assert error.startswith(f"error: {folders[0] / 'arm.json'} is damaged") and line.startswith("compare")
    assert MlflowClient(tracking_uri=uri).get_run(run_id(folders[1])).info.status == "FAILED"


def test_the_page_of_comparison_names_the_arms(uri: str, tmp_path: Path) -> None:
    folders = [arm(tmp_path / loss, uri, "pair", loss) for loss in ("uniform", "minsnr")]
    (line,) = compare_line([*folders, tmp_path])
    _, path, query = split(line)
    assert path == "/compare-runs"
    assert urlsplit(urlsplit(line.split()[-1]).fragment).query.startswith("runs=")  # else the page does not find them
    assert json.loads(query["runs"][0]) == [run_id(folder) for folder in folders]
    store = MlflowClient(tracking_uri=uri)
    assert store.get_experiment(json.loads(query["experiments"][0])[0]).name == "nai_xl"


def split(line: str) -> tuple[str, str, dict[str, list[str]]]:
    """A line's server, page and query: the page is behind the #, as in every address of MLflow."""
    address = urlsplit(line.split()[-1])
    page = urlsplit(address.fragment)
    assert parse_qs(page.query)["workflowType"] == ["machine_learning"]
    return address.netloc, page.path, parse_qs(page.query)


def run_id(folder: Path) -> str:
    progress = Progress.read(folder)
    assert progress
    return progress.run_id


def test_arms_that_never_reached_mlflow_have_no_address(tmp_path: Path) -> None:
    assert compare_line([tmp_path]) == []


def test_a_server_has_addresses_of_its_own(tmp_path: Path) -> None:
    Progress("http://tracking:8080/", "nai_xl", "token", "7", "abc").write(tmp_path)
    (line,) = compare_line([tmp_path])
    assert split(line)[0] == "tracking:8080"
