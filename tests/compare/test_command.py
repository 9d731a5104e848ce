"""The command: which runs it finds, the files it writes, the mistakes it tells."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nai_xl.compare.comparison import Comparison, compare
from nai_xl.compare.figures.method import method
from nai_xl.compare.question import Question
from nai_xl.compare.report import delivery
from nai_xl.compare.runs import from_mlflow
from nai_xl.compare.runs.directory import read_directory
from nai_xl.config import stored_config
from nai_xl.errors import UserError
from nai_xl.tracker.mlflow.delivery import Progress
from tests.compare.losses import BASE, GOOD, QUESTION, Command
from tests.synthetic import BATCH, write_run


class Page(HTMLParser):
    """Everything in the page that a browser would fetch, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "srcset", "href", "xlink:href", "data")
        ]
        self.fetched += [tag] * (tag in ("script", "link", "iframe", "object", "embed"))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_command_writes_a_whole_report(report: tuple[str, Path]) -> None:
    out, folder = report
    assert QUESTION in out and re.search(r"minsnr +better", out) and "report: outputs/compare-losses/report.html" in out
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.fetched)
    assert all(link.startswith(("#", "data:")) for link in re.findall(r"url\(['\"]?([^)]*)", text))
    words = " ".join(" ".join(page.words).split())
    assert QUESTION in words and "<best>" not in text
    for name in ("uniform", "minsnr", "edm", "p2", "debiased"):
        assert name in words
    for verdict in ("better", "worse", "identical", "failed"):
        assert verdict in words
    assert text.index(">better</span> than") < text.index("<table") < text.index("<svg")  # answers, table, figures
    assert "prefers-color-scheme: dark" in text and "var(--ink)" in text
    assert "nan" not in words.lower().split()

    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert len(rows) == 8 and {row["verdict"] for row in rows} == {"better", "worse", "identical", "failed"}
    best = next(row for row in rows if row["arm"] == "loss=minsnr" and row["metric"] == "val/loss")
    assert float(best["low"]) < -0.05 < float(best["high"]) and best["seeds"] == "0 1 2 3" and best["items"] == "24"
    assert float(best["bootstrap_low"]) < float(best["difference"]) and float(best["images"]) == 800 * BATCH
    data = json.loads((folder / "results.json").read_text())
    assert data["question"] == QUESTION and len(data["results"]) == 8 and data["cost"][0]["images"] == 12800
    assert data["differences"]["loss.gamma"] != [] and data["arms"][0]["arm"] == "loss=uniform"
    assert "| val/loss | minsnr | better |" in (folder / "report.md").read_text()


def test_the_figures_are_pictures(report: tuple[str, Path]) -> None:
    _, folder = report
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {
        "differences",
        "curves",
        "method",
        "samples_seed_0",
        "samples_seed_1",
        "samples_seed_2",
        "samples_seed_3",
    }
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_two_directories_are_compared_with_the_first_as_baseline(told: Command, outputs: Path) -> None:
    paths = [f"outputs/{arm}-{seed}" for seed in range(3) for arm in ("p2", "uniform")]
    out = told(*paths, "metrics=val/loss")
    assert re.search(r"p2 +baseline", out) and re.search(r"uniform +better", out)


def test_the_method_is_drawn_as_it_is_trained(tmp_path: Path) -> None:
    runs, configs = [], {}
    for normalized in ("false", "true"):
        overrides = ["loss=minsnr", f"objective.normalize_weights={normalized}"]
        path = write_run(tmp_path, {"normalized": normalized}, 0, effect={"val/loss": 0.0}, overrides=overrides)
        runs.append(read_directory(path, {}))
        configs[path.name] = stored_config(path)
    assert method(compare(runs, Question("x")), configs) is not None


def test_runs_outside_of_a_sweep_are_named_by_what_differs(told: Command, tmp_path: Path) -> None:
    for rate in ("0.001", "0.002"):
        for seed in (0, 1):
            arm, overrides = {"rate": rate}, [f"optimizer.lr={rate}"]
            path = write_run(tmp_path, arm, seed, effect={"val/loss": 10 * float(rate)}, overrides=overrides)
            (path / "arm.json").unlink()
    out = told(*(str(tmp_path / f"{rate}-{seed}") for rate in ("0.001", "0.002") for seed in (0, 1)))
    assert re.search(r"lr=0.001 +baseline", out) and "lr=0.002" in out and "seeds 0, 1" in out
    for path in tmp_path.glob("0.00*"):  # now with the choices that a run notes: the same rate is one option's default
        choices = {"optimizer": "slow" if path.name.startswith("0.001") else "fast", "loss": "minsnr"}
        (path / "params.json").write_text(json.dumps({"params": {**choices, "optimizer.lr": 1}, "tags": {}}))
    out = told(*(str(tmp_path / f"{rate}-{seed}") for rate in ("0.001", "0.002") for seed in (0, 1)))
    assert re.search(r"slow +baseline", out) and "fast" in out and "lr=" not in out
    assert len(list(tmp_path.glob("compare-runs-*/report.html"))) == 2  # other baselines, by name, are two questions


def test_a_question_has_one_folder_and_another_question_another(told: Command, tmp_path: Path) -> None:
    for loss in ("uniform", "minsnr", "edm"):
        for seed in range(2):
            question = {"name": "s", "question": "Which?", "baseline": "loss=uniform", "metrics": ["val/loss"]}
            effect = {"val/loss": 0.1, "color/error": 0.1}
            write_run(tmp_path, {"loss": loss}, seed, effect=effect, sweep="s", question=question)
    write_run(tmp_path, {"rate": "1"}, 0, effect={"val/loss": 0.1}, sweep="other", overrides=["optimizer.lr=1"])
    sweep = ["sweep=s", f"output_dir={tmp_path}"]

    def folders() -> set[str]:
        return {path.parent.name for path in tmp_path.glob("compare-*/report.html")}

    told(*sweep)
    own = (tmp_path / "compare-s" / "report.html").read_bytes()
    asked = [
        [*sweep, "baseline=loss=minsnr"],
        [*sweep, "metrics=color/error"],
        [f"{tmp_path / 'uniform-0'}", f"{tmp_path / 'minsnr-0'}"],
        [f"{tmp_path / 'uniform-0'}", f"{tmp_path / '1-0'}"],
    ]
    for number, arguments in enumerate(asked, start=2):
        told(*arguments)
        assert len(folders()) == number and (tmp_path / "compare-s" / "report.html").read_bytes() == own
    for arguments in [*asked, [*sweep, "baseline=loss=uniform", "metrics=val/loss"]]:
        told(*arguments)
    assert len(folders()) == 5  # the same question, the same folder
    assert len({name for name in folders() if name.startswith("compare-s-")}) == 3
    assert len({name for name in folders() if name.startswith("compare-runs-")}) == 1
    (other,) = [path for path in tmp_path.glob("compare-s-*/report.html") if "baseline loss=minsnr" in path.read_text()]
    assert "Which? (baseline loss=minsnr)" in other.read_text()


def test_margin_and_wanted_difference_are_settings_of_the_command(told: Command, outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs, tmp_path / "here", ignore=shutil.ignore_patterns("compare-*"))
    asked = ["sweep=losses", f"output_dir={tmp_path / 'here'}", "metrics=val/loss"]
    out = told(*asked, "equivalence=30%", "detect=2.3%")
    assert re.search(r"minsnr +equal within 30 %", out)
    assert re.search(r"val/loss, minsnr: 2.3 % takes about \d+ seeds, here are 4, [\d,]+ minutes more", out)
    (folder,) = (tmp_path / "here").glob("compare-losses-*")  # another margin is another question
    data = json.loads((folder / "results.json").read_text())
    (one,) = (row for row in data["power"] if row["arm"] == "loss=minsnr")
    assert one["wanted"] > 4 and one["seeds"] == 4 and one["shown"]["3"] > one["shown"]["20"]
    runs = one["wanted"] - 4
    assert one["minutes"] == pytest.approx(runs * (61.5 + 61.5) / 60)  # a run of seed s takes 60 + s seconds
    assert "here are" not in told(*asked, "detect=90%")


def test_an_experiment_names_its_sweep(told: Command, outputs: Path) -> None:
    assert "no run of sweep terminal_step in outputs; there is losses" in told("experiment=terminal_step", status=1)


def test_lists_name_arms_and_a_sweep_keeps_its_question(told: Command, tmp_path: Path) -> None:
    """[math] is no markup; an arm may have been trained for another sweep, or stopped before it wrote its config."""
    asked = {"name": "memory", "baseline": "memory=[sdpa]", "metrics": ["val/loss"]}
    other = {"name": "other", "baseline": "memory=[math]", "question": "another"}
    for arm in ("[math]", "[sdpa]", "[sdpa,tf32]"):
        for seed, question in enumerate((asked, other, asked)):
            choice, effect = {"memory": arm}, {"val/loss": 0.1}
            newest = write_run(tmp_path, choice, seed, effect=effect, sweep="memory", question=question)
    (newest / "config.yaml").unlink()
    out = told("sweep=memory", f"output_dir={tmp_path}")
    assert "Baseline: memory=[sdpa]." in out and re.search(r"\[sdpa\] +baseline", out) and "[sdpa,tf32]" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to compare"),
        (["sweep=losses", "outputs/uniform-0"], "say what to compare"),
        (["sweep=none"], "there is losses"),
        (["swep=losses"], "no setting 'swep' of nai_xl.compare; there is experiment, sweep"),
        (["experiment=terminal_stp"], "experiment=terminal_stp: no such option; did you mean 'terminal_step'?"),
        (["outputs/none"], "outputs/none: no such directory"),
        (["outputs"], "holds neither arm.json nor metrics.jsonl"),
        (["outputs/uniform-0", "outputs/uniform-1"], "has one arm only (loss=uniform)"),
        (["sweep=losses", "baseline=loss=none"], "baseline=loss=none is no arm of this sweep; there is loss=debiased"),
        (["sweep=losses", "metrics=val/los"], "nothing to compare: there is train/loss"),
        (["sweep=losses", "equivalence=little"], "equivalence: little is no difference; write 2%, or 0.1"),
        (["sweep=losses", "detect=0%"], "detect: 0% is no difference"),
    ],
)
def test_mistakes_are_told(told: Command, arguments: list[str], message: str) -> None:
    assert message in told(*arguments, status=1)


def test_a_sweep_of_failures_says_why(tmp_path: Path, told: Command) -> None:
    for arm in (BASE, GOOD):
        write_run(tmp_path, arm, 0, effect={}, steps=[], status="FAILED", error=f"{arm['loss']} broke")
    err = told("sweep=choices", f"output_dir={tmp_path}", status=1)
    assert "loss=uniform: uniform broke" in err and "loss=minsnr: minsnr broke" in err


def test_runs_whose_directories_are_elsewhere_come_from_mlflow(
    told: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("nai_xl", artifact_location=tmp_path.as_uri())
    for arm, shift in (("uniform", 0.0), ("minsnr", -0.5)):
        for seed in range(3):
            run = client.create_run(experiment, run_name=f"gone-{arm}-{seed}").info.run_id
            noise = np.random.default_rng(seed).normal() + np.random.default_rng([seed, len(arm)]).normal() / 100
            points = [Metric("val/loss", 1 + shift * step / 200 + noise, 0, step) for step in (100, 200)]
            tags = {"sweep": "far", "seed": str(seed), "loss": arm, "model": "tiny", "git_commit": f"{arm}{seed}"}
            params = [Param("loss.gamma", arm)]
            client.log_batch(run, points, params, [RunTag(*pair) for pair in tags.items()])
            client.set_terminated(run)
    out = told("runs=tags.sweep = 'far'", f"uri={uri}", f"output_dir={tmp_path}", "baseline=loss=uniform")
    monkeypatch.setattr(from_mlflow, "PAGE", 4)
    assert len(from_mlflow.search_mlflow(uri, "tags.sweep = 'far'")[1]) == 6
    assert re.search(r"minsnr +better", out) and len(list(tmp_path.glob("compare-far-*/report.html"))) == 1
    told("runs=tags.sweep = 'far'", f"uri={uri}", f"output_dir={tmp_path}")
    assert (tmp_path / "compare-far" / "report.html").is_file()
    assert "selects no run" in told("runs=tags.sweep = 'none'", f"uri={uri}", status=1)
    assert "MLflow at" in told("runs=tags.sweep is odd", f"uri={uri}", status=1)


def test_runs_in_mlflow_are_read_from_their_directories_where_these_are_here(
    told: Command, outputs: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    uri, here = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "here"
    shutil.copytree(outputs, here)
    client = MlflowClient(uri)
    experiment = client.create_experiment("mine", artifact_location=tmp_path.as_uri())
    for arm, seed in product(("uniform", "minsnr"), "012"):
        # an arm has another name there than its directory
        run = client.create_run(experiment, run_name="v s0", tags={"sweep": "losses", "seed": seed, "loss": arm})
        Progress(uri, "mine", "token", experiment, run.info.run_id).write(here / f"{arm}-{seed}")
    out = told("runs=tags.sweep = 'losses'", f"uri={uri}", f"output_dir={here}")
    assert QUESTION in out and re.search(r"minsnr +better .* 3 x [2-9]", out) and "MLflow: http" in out


def test_the_report_goes_where_the_arms_are(
    found: Comparison, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert delivery.log(found, []) == ""  # the arms are in no MLflow
    calls: list[tuple[object, ...]] = []

    def log_summary(*given: object, uri: str, experiment: str) -> str:
        calls.append((*given, uri, experiment))
        if len(calls) > 1:
            raise UserError("the store does not answer")
        return "http://page"

    monkeypatch.setattr(delivery, "log_summary", log_summary)
    note = outputs / "uniform-1" / "mlflow.json"
    Progress("sqlite:///far.db", "mine", "token", run_id="1").write(note.parent)
    try:
        assert delivery.log(found, [tmp_path]) == "MLflow: http://page"
        assert delivery.log(found, [tmp_path]) == "not in MLflow: the store does not answer"
    finally:
        note.unlink()
    name, question, files, metrics, *where = calls[0]
    assert (name, question, files, where) == ("losses", QUESTION, [tmp_path], ["sqlite:///far.db", "mine"])
    assert isinstance(metrics, dict) and metrics["val/loss/minsnr"] == pytest.approx(-0.05, abs=0.01)
    assert len(metrics) == 6 and metrics["val/loss/edm"] == 0


def test_a_damaged_file_is_named_with_its_cure(told: Command, tmp_path: Path) -> None:
    paths = [write_run(tmp_path, arm, 0, effect={"val/loss": 0.1}, sweep="torn") for arm in (BASE, GOOD)]
    (paths[1] / "arm.json").write_text('{"sweep": "torn", "arm": {"lo')
    for arguments in (["sweep=torn", f"output_dir={tmp_path}"], list(map(str, paths))):
        err = told(*arguments, status=1)
        assert "minsnr-0/arm.json is damaged" in err and "train that run again, or remove the file" in err
    (paths[1] / "arm.json").unlink()
    (paths[1] / "params.json").write_text("{")
    assert "minsnr-0/params.json is damaged" in told(*map(str, paths), status=1)
