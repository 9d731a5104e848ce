"""What a sweep leaves in MLflow besides its arms, and the addresses it names."""

import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow import MlflowClient

from nai_xl.errors import UserError
from nai_xl.report import sync
from nai_xl.report.mlflow_delivery import Progress
from nai_xl.report.mlflow_sweep import log_summary, sweep_pages
from nai_xl.report.tracking import JsonlTracker


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def arm(folder: Path, uri: str, sweep: str, loss: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "arm.json").write_text(json.dumps({"sweep": sweep, "arm": {"loss": loss}, "seed": 0}))
    with JsonlTracker(folder) as tracker:
        tracker.log(1, {"val/loss": 1.0})
    sync.sync(folder, uri)
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


def test_report_too_long_for_a_description_leaves_the_question_there(uri: str, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    report.write_text("long " * 2000)
    log_summary("long", "Is it long?", [report], {}, uri=uri, experiment="e")
    store = MlflowClient(tracking_uri=uri)
    runs = store.search_runs([store.get_experiment_by_name("e").experiment_id], "tags.sweep_summary = 'long'")
    assert runs[0].data.tags["mlflow.note.content"] == "Is it long?"


def test_summary_for_a_store_that_is_not_there_names_the_override(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracker\.uri"):
        log_summary("a", "b", [], {}, uri="sqlite:////proc/none/x.db")


def test_addresses_find_the_arms_of_the_sweep_and_no_others(uri: str, tmp_path: Path) -> None:
    folders = [arm(tmp_path / loss, uri, "losses", loss) for loss in ("uniform", "minsnr")]
    arm(tmp_path / "else", uri, "another", "uniform")
    serve, curves, compare = sweep_pages("losses", folders)
    assert f"mlflow ui --backend-store-uri {uri}" in serve
    _, path, query = split(curves)
    store = MlflowClient(tracking_uri=uri)
    found = store.search_runs([path.split("/")[2]], query["searchFilter"][0])
    links = [Progress.read(folder) for folder in folders]
    ids = [link.run_id for link in links if link]
    assert sorted(run.info.run_id for run in found) == sorted(ids)
    _, _, query = split(compare)
    assert json.loads(query["runs"][0]) == ids
    assert store.get_experiment(json.loads(query["experiments"][0])[0]).name == "nai_xl"


def split(line: str) -> tuple[str, str, dict[str, list[str]]]:
    """A line's server, page and query: the page is behind the #, as in every address of MLflow."""
    address = urlsplit(line.split()[-1])
    page = urlsplit(address.fragment)
    assert parse_qs(page.query)["workflowType"] == ["machine_learning"]
    return address.netloc, page.path, parse_qs(page.query)


def test_arms_that_never_reached_mlflow_have_no_address(tmp_path: Path) -> None:
    assert sweep_pages("losses", [tmp_path]) == []


def test_a_server_has_its_own_addresses_and_needs_none_to_serve(tmp_path: Path) -> None:
    Progress("http://tracking:8080/", "nai_xl", "token", "7", "abc").write(tmp_path)
    curves, compare = sweep_pages("losses", [tmp_path])
    assert {split(line)[0] for line in (curves, compare)} == {"tracking:8080"}
    assert split(curves)[1] == "/experiments/7/runs"
