"""From run directories to the report: what is compared with what, what is left out and said, and the files."""

import csv
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from html.parser import HTMLParser
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from nai_xl.compare import report as compare
from nai_xl.compare.comparison import Comparison, Question, Row, group
from nai_xl.compare.comparison import compare as compared
from nai_xl.compare.runs import Run, read_directory
from nai_xl.compare.wording import answer, markdown, remarks
from nai_xl.errors import UserError
from nai_xl.evals.contact_sheet import Prompt, cells, contact_sheet
from nai_xl.interfaces import Bucket
from nai_xl.tracker.mlflow.delivery import Progress
from tests.synthetic import BATCH, blob, write_run

QUESTION = "Which loss is <best> & why?"
METRICS = ["val/loss", "color/error"]
BASE, GOOD, SAME, BAD, LOST = ({"loss": name} for name in ("uniform", "minsnr", "edm", "p2", "debiased"))
EFFECTS = {
    "uniform": {"val/loss": 0.0, "color/error": 0.0},
    "minsnr": {"val/loss": -0.05, "color/error": 0.0},
    "edm": {"val/loss": 0.0, "color/error": 0.0},
    "p2": {"val/loss": 0.05, "color/error": -0.08},
    "debiased": {"val/loss": 0.0, "color/error": 0.0},
}
ASKED = {"name": "losses", "question": QUESTION, "baseline": "loss=uniform", "metrics": METRICS}


def sheet(shade: int) -> Image.Image:
    prompts = [Prompt(f"disc {i}", Bucket(96, 96), blob(i, 0)) for i in range(6)]
    return contact_sheet(prompts, [blob(i, shade) for i in range(6)])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over losses: one better, one an A/A arm, one worse that lacks seed 2, one that failed altogether."""
    folder = tmp_path_factory.mktemp("sweep") / "outputs"
    for shade, arm in enumerate((BASE, GOOD, SAME, BAD, LOST)):
        for seed in range(3):
            if (arm, seed) == (BAD, 2):
                continue
            write_run(
                folder, arm, seed, sweep="losses", effect=EFFECTS[arm["loss"]], overrides=[f"loss={arm['loss']}"],
                status="FAILED" if arm is LOST else "FINISHED", error="loss is not finite" if arm is LOST else None,
                steps=[] if arm is LOST else range(100, 801, 100), sheet=sheet(40 * shade), question=ASKED,
            )  # fmt: skip
    return folder


Command = Callable[..., str]


@pytest.fixture
def told(outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command beside the sweep; what it printed."""
    monkeypatch.chdir(outputs.parent)

    def run(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        if status:
            with pytest.raises(SystemExit) as stopped:
                compare.main()
            assert stopped.value.code == status
            return capsys.readouterr().err
        compare.main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def found(outputs: Path) -> Comparison:
    runs = [read_directory(path, {}, "losses") for path in sorted(outputs.glob("*-[012]"))]
    return compared(runs, Question("losses", QUESTION, "loss=uniform", METRICS))


def row(found: Comparison, metric: str, arm: dict[str, str]) -> Row:
    return next(row for row in found.of(metric) if row.arm == f"loss={arm['loss']}")


# --- what is found ----------------------------------------------------------------------------------------------------


def test_the_verdicts_are_those_that_were_built_in(found: Comparison) -> None:
    table = {arm["loss"]: [row(found, metric, arm).verdict for metric in METRICS] for arm in (GOOD, SAME, BAD, LOST)}
    assert table == {
        "minsnr": ["better", "no difference shown"],
        "edm": ["no difference shown", "no difference shown"],
        "p2": ["worse", "better"],
        "debiased": ["failed", "failed"],
    }
    effect = row(found, "val/loss", GOOD).effect
    assert effect is not None and effect.low is not None and effect.high is not None
    assert effect.low < -0.05 < effect.high and (effect.seeds, effect.items) == (3, 24)
    assert effect.factor is not None and effect.factor > 3


def test_an_aa_arm_differs_by_exactly_nothing(found: Comparison) -> None:
    for metric in METRICS:
        effect = row(found, metric, SAME).effect
        assert effect is not None and (effect.difference, effect.low, effect.high, effect.p) == (0, 0, 0, 1)
    assert "edm (identical)" in answer(found, "val/loss")


def test_a_missing_seed_and_failures_are_said(found: Comparison) -> None:
    worse = row(found, "val/loss", BAD)
    assert worse.seeds == [0, 1] and worse.effect is not None and worse.effect.seeds == 2
    said = remarks(found)
    assert "p2: seed 2 only in the baseline: left out" in said
    assert sum("debiased: failed with seed" in line and "loss is not finite" in line for line in said) == 3
    assert "There is no result of debiased, which failed." in answer(found, "color/error")


def test_sentences_say_who_by_how_much_and_what_is_possible(found: Comparison) -> None:
    said = answer(found, "val/loss")
    assert re.match(r"minsnr \(.1\d %\) is better than uniform; p2 \(\+1\d %\) is worse\. No difference", said)
    assert "worse" not in answer(found, "color/error")


def curve_run(arm: str, seed: int, values: dict[int, float], **more: object) -> Run:
    return Run(f"{arm}-{seed}", {"loss": arm}, seed, curves={"val/loss": values}, **more)  # type: ignore[arg-type]


def test_the_last_common_step_is_compared_and_told() -> None:
    runs = [curve_run("a", s, {100: 5.0 + s, 200: 4.0 + s, 300: 1.0}) for s in range(3)]
    runs += [curve_run("b", s, {100: 4.0 + s, 200: 2.0 + s}, status="RUNNING") for s in range(3)]
    found = compared(runs, Question("x", baseline="loss=a"))
    (one,) = found.rows
    assert one.step == 200 and one.effect is not None and one.effect.difference == -2.0 and one.verdict == "better"
    assert "b: compared at step 200, the last in common; one side goes on to 300" in remarks(found)
    assert "b: still running" in remarks(found)


def test_what_is_not_finite_is_left_out_and_said() -> None:
    runs = [curve_run("a", s, {100: 1.0 + s}) for s in range(3)]
    runs += [curve_run("b", s, {100: math.nan if s == 1 else 2.0 + s}) for s in range(3)]
    found = compared(runs, Question("x", baseline="loss=a"))
    assert found.rows[0].seeds == [0, 2] and "not finite with seed 1" in remarks(found)[0]


def test_without_a_common_seed_there_is_no_pair() -> None:
    runs = [curve_run("a", 0, {100: 1.0}), curve_run("b", 1, {100: 2.0})]
    assert compared(runs, Question("x", baseline="loss=a")).rows[0].verdict == "no pairs"


def test_a_failed_baseline_is_said_with_its_error() -> None:
    runs = [curve_run("a", 0, {}, status="FAILED", error="out of memory"), curve_run("b", 0, {100: 2.0})]
    row = compared(runs, Question("x", baseline="loss=a")).rows[0]
    assert row.verdict == "no pairs" and "the baseline failed with seed 0: out of memory" in row.notes


def test_one_seed_is_not_judged_even_with_items(outputs: Path) -> None:
    runs = [read_directory(outputs / f"{name}-0", {}, "losses") for name in ("uniform", "minsnr")]
    (one,) = compared(runs, Question("x", baseline="loss=uniform", metrics=["val/loss"])).rows
    assert one.verdict == "one seed only" and one.p_holm is None
    assert one.effect is not None and one.effect.items == 24 and one.effect.low is not None


def test_items_count_only_where_the_metric_is_their_mean(tmp_path: Path) -> None:
    for name in ("uniform", "minsnr"):
        for seed in range(2):
            path = write_run(tmp_path, {"loss": name}, seed, effect={"val/loss": 0.01})
            if (name, seed) == ("minsnr", 1):
                rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
                text = "".join(json.dumps({**r, "val/loss": r["val/loss"] * 1.1}) + "\n" for r in rows)
                (path / "metrics.jsonl").write_text(text)
    runs = [read_directory(path, {}) for path in sorted(tmp_path.iterdir())]
    (one,) = compared(runs, Question("x", baseline="loss=uniform", metrics=["val/loss"])).rows
    assert one.effect is not None and (one.effect.seeds, one.effect.items) == (2, 1)


def test_holm_counts_all_arms_and_metrics(found: Comparison) -> None:
    tested = [row for row in found.rows if row.p_holm is not None and row.effect is not None]
    assert len(tested) == 6  # three arms that did not fail, two metrics
    smallest = min(tested, key=lambda row: row.effect.p or 0)  # type: ignore[union-attr]
    assert smallest.effect is not None and smallest.effect.p is not None
    assert smallest.p_holm == pytest.approx(6 * smallest.effect.p)


def test_images_to_the_baselines_last_loss() -> None:
    runs = [curve_run("a", s, {100: 5.0, 200: 3.0, 300: 2.0 + s}, images=3000, steps=300) for s in (0, 1)]
    runs += [curve_run("b", s, {100: 3.0, 200: 1.0, 300: 0.5}, images=3000, steps=300) for s in (0, 1)]
    runs += [curve_run("c", s, {100: 9.0, 200: 9.0, 300: 9.0 * s - 8}, images=3000, steps=300) for s in (0, 1)]
    runs += [curve_run("d", s, {100: 9.0, 200: 9.0, 300: 9.0 - 9 * s}, images=3000, steps=300) for s in (0, 1)]
    found = compared(runs, Question("x", baseline="loss=a"))
    targets = {target.arm: target for target in found.targets}
    assert targets["loss=b"].images == {0: 2000, 1: 1000} and targets["loss=b"].baseline_images == {0: 3000, 1: 2000}
    assert targets["loss=b"].ratio is not None and targets["loss=b"].ratio[0] == pytest.approx((2 / 3 * 1 / 2) ** 0.5)
    assert targets["loss=c"].ratio is not None and targets["loss=d"].ratio is None
    assert targets["loss=d"].images == {0: None, 1: 3000}


def test_parts_of_a_metric_are_compared_only_when_named() -> None:
    values = {100: 1.0}
    curves = dict.fromkeys(["train/loss", "perf/mfu", "val/loss", "val/loss_band_0_250", "color/error"], values)
    runs = [Run(f"{arm}{s}", {"loss": arm}, s, curves=curves) for arm in "ab" for s in (0, 1)]
    assert compared(runs, Question("x")).metrics == ["val/loss", "color/error"]
    assert compared(runs, Question("x", metrics=["val/loss_band_0_250"])).metrics == ["val/loss_band_0_250"]


def test_the_same_arm_and_seed_twice_counts_once_and_is_said() -> None:
    runs = [curve_run("a", 0, {1: 1.0}), Run("again", {"loss": "a"}, 0), curve_run("b", 0, {1: 1.0})]
    arms, notes = group(runs)
    assert arms[0].runs[0].name == "again" and notes == ["loss=a has seed 0 twice: again counts, a-0 is left out"]


def test_arms_stand_in_natural_order_under_short_names() -> None:
    def names(*arms: dict[str, str]) -> list[str]:
        runs = [Run(str(i), arm, 0, curves={"val/loss": {1: 1.0}}) for i, arm in enumerate(arms)]
        return list(compared(runs, Question("x")).names.values())

    assert names({"loss.gamma": "20"}, {"loss.gamma": "5"}) == ["gamma=5", "gamma=20"]
    assert names({"a": "x"}, {"a": "y", "g": "5"}, {"a": "y", "g": "20"}) == ["x", "y + g=5", "y + g=20"]
    assert names({"a.n": "1", "b.n": "5"}, {"a.n": "2", "b.n": "6"}) == ["a.n=1 + b.n=5", "a.n=2 + b.n=6"]
    assert names({"a": "x", "b": "on"}, {"a": "y", "b": "on"}) == ["x", "y"]
    assert names({"a": "x", "ema": "none"}, {"a": "y", "ema": "standard"}) == ["x + ema=none", "y + standard"]


# --- the command ------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def report(outputs: Path) -> tuple[str, Path]:
    """What the command prints about the sweep, and where its report lies."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.chdir(outputs.parent)
        patch.setattr(sys, "argv", ["compare", "sweep=losses"])
        compare.main()
    return printed.getvalue(), outputs / "compare-losses"


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
    for verdict in ("better", "worse", "no difference shown", "failed"):
        assert verdict in words
    assert text.index(">better</span> than") < text.index("<table") < text.index("<svg")  # answers, table, figures
    assert "prefers-color-scheme: dark" in text and "var(--ink)" in text
    assert "nan" not in words.lower().split()

    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert len(rows) == 8 and {row["verdict"] for row in rows} == {"better", "worse", "no difference shown", "failed"}
    best = next(row for row in rows if row["arm"] == "loss=minsnr" and row["metric"] == "val/loss")
    assert float(best["low"]) < -0.05 < float(best["high"]) and best["seeds"] == "0 1 2" and best["items"] == "24"
    assert float(best["bootstrap_low"]) < float(best["difference"]) and float(best["images"]) == 800 * BATCH
    data = json.loads((folder / "results.json").read_text())
    assert data["question"] == QUESTION and len(data["results"]) == 8 and data["cost"][0]["images"] == 12800
    assert data["differences"]["loss.gamma"] != [] and data["arms"][0]["arm"] == "loss=uniform"
    assert "| val/loss | minsnr | better |" in (folder / "report.md").read_text()


def test_the_figures_are_pictures(report: tuple[str, Path]) -> None:
    _, folder = report
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {"differences", "curves", "method", "samples_seed_0", "samples_seed_1", "samples_seed_2"}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_two_directories_are_compared_with_the_first_as_baseline(told: Command, outputs: Path) -> None:
    out = told("outputs/p2-0", "outputs/uniform-0", "outputs/p2-1", "outputs/uniform-1", "metrics=val/loss")
    assert re.search(r"p2 +baseline", out) and re.search(r"uniform +better", out)


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
    assert (tmp_path / "compare-runs" / "report.html").is_file()


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
    ],
)
def test_mistakes_are_told(told: Command, arguments: list[str], message: str) -> None:
    assert message in told(*arguments, status=1)


def test_a_sweep_of_failures_says_why(tmp_path: Path, told: Command) -> None:
    for arm in (BASE, GOOD):
        write_run(tmp_path, arm, 0, effect={}, steps=[], status="FAILED", error=f"{arm['loss']} broke")
    err = told("sweep=choices", f"output_dir={tmp_path}", status=1)
    assert "loss=uniform: uniform broke" in err and "loss=minsnr: minsnr broke" in err


def test_runs_whose_directories_are_elsewhere_come_from_mlflow(told: Command, tmp_path: Path) -> None:
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
    assert re.search(r"minsnr +better", out) and (tmp_path / "compare-far" / "report.html").is_file()
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
    assert compare.log(found, []) == ""  # the arms are in no MLflow
    calls: list[tuple[object, ...]] = []

    def log_summary(*given: object, uri: str, experiment: str) -> str:
        calls.append((*given, uri, experiment))
        if len(calls) > 1:
            raise UserError("the store does not answer")
        return "http://page"

    monkeypatch.setattr(compare, "log_summary", log_summary)
    note = outputs / "uniform-1" / "mlflow.json"
    Progress("sqlite:///far.db", "mine", "token", run_id="1").write(note.parent)
    try:
        assert compare.log(found, [tmp_path]) == "MLflow: http://page"
        assert compare.log(found, [tmp_path]) == "not in MLflow: the store does not answer"
    finally:
        note.unlink()
    name, question, files, metrics, *where = calls[0]
    assert (name, question, files, where) == ("losses", QUESTION, [tmp_path], ["sqlite:///far.db", "mine"])
    assert isinstance(metrics, dict) and metrics["val/loss/minsnr"] == pytest.approx(-0.05, abs=0.01)
    assert len(metrics) == 6 and metrics["val/loss/edm"] == 0


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 6, 12])
@pytest.mark.parametrize("references", [True, False])
def test_contact_sheets_are_taken_apart_as_they_were_made(count: int, references: bool) -> None:
    prompts = [Prompt(f"number {i}", Bucket(96, 96), blob(100 + i, 0) if references else None) for i in range(count)]
    samples = [blob(i, 50) for i in range(count)]
    apart = cells(contact_sheet(prompts, samples))
    assert len(apart) == count
    for cell, prompt, sample in zip(apart, prompts, samples, strict=True):
        assert cell.sample.tobytes() == sample.tobytes()
        assert (cell.reference.tobytes() if cell.reference else None) == (
            prompt.reference.tobytes() if prompt.reference else None
        )


@pytest.mark.parametrize("side", [64, 128])
def test_a_long_prompt_stays_below_its_own_picture(side: int) -> None:
    def second(first: str) -> bytes:
        prompts = [Prompt(text, Bucket(side, side)) for text in (first, "a completely red image")]
        sheet = contact_sheet(prompts, [Image.new("RGB", (side, side)) for _ in prompts])
        return cells(sheet)[1].caption.tobytes()

    assert second("short") == second("an extraordinarily long prompt " * 20) == second("pneumono" * 20)


def test_a_picture_of_another_layout_is_no_contact_sheet() -> None:
    assert cells(Image.new("RGB", (501, 333))) == []


def test_markdown_is_a_table_of_every_row(found: Comparison) -> None:
    assert markdown(found).count("\n| ") == 1 + len(found.rows)


def test_an_arm_that_has_not_begun_is_no_obstacle(outputs: Path, tmp_path: Path) -> None:
    """arm.json is written before config.yaml and metrics.jsonl."""
    (tmp_path / "new").mkdir()
    note = {"sweep": "losses", "arm": {"loss": "soft"}, "seed": 0, "status": "RUNNING", "error": None}
    (tmp_path / "new" / "arm.json").write_text(json.dumps(note))
    paths = [outputs / "uniform-0", outputs / "minsnr-0", tmp_path / "new"]
    found = compared([read_directory(path, {}, "losses") for path in paths], Question("x", baseline="loss=uniform"))
    assert {row.verdict for row in found.rows if row.arm == "loss=soft"} == {"not measured"}
    assert OmegaConf.load(outputs / "uniform-0" / "config.yaml").sweep.name == "losses"
