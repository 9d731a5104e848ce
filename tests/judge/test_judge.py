"""python -m nai_xl.judge: models of three forms, told apart by their markers, measured alike."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nai_xl import config
from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.interfaces import Parameterization, Schedule
from nai_xl.judge import measure
from nai_xl.judge.__main__ import main
from nai_xl.judge.arguments import arguments
from nai_xl.judge.models import models
from nai_xl.model.export import export
from nai_xl.model.sdxl import load_sdxl
from nai_xl.record.items import read_items
from nai_xl.train import train
from tests.conftest import SMALL

Command = Callable[..., str]
LEVELS = "val/x0_loss_logsnr"
COLOR = ("evals=[val_loss,color]", "evals.color.steps=2", "evals.color.colors=[black,red]")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one step, its pipeline, and its single file in float32."""
    home = tmp_path_factory.mktemp("judge")
    random = np.random.default_rng(0)
    for part in ("known", "new"):
        (home / part).mkdir()
        for number in range(4):
            Image.fromarray(random.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(home / part / f"{number}.png")
            (home / part / f"{number}.txt").write_text(f"picture {number}")
    cfg = config.compose([*SMALL, f"data.dir={home}/known", "run.max_images=2", f"output_dir={home}", "name=run"])
    config.check(cfg)
    train(cfg, {}).rename(home / "run")
    export(home / "run", home / "one.safetensors", "fp32")
    return home


@pytest.fixture
def judged(made: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., str], tmp_path: Path) -> Command:
    """Runs the command beside the models on new images; what it printed."""
    monkeypatch.chdir(made)
    return partial(_judged, typed, ["data.dir=new", "evals.val_loss.count=3", f"output_dir={tmp_path}"])


def _judged(typed: Command, small: list[str], *words: str, status: int = 0) -> str:
    given = {word.partition("=")[0] for word in words}
    return typed(main, *words, *(word for word in small if word.partition("=")[0] not in given), status=status)


def results(tmp_path: Path, name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(metric, side) -> its row of results.json."""
    rows = json.loads((tmp_path / f"judge-{name}" / "results.json").read_text())["results"]
    return {(row["metric"], row["arm"].removeprefix("model=")): row for row in rows}


# --- equal models -----------------------------------------------------------------------------------------------------


def test_a_run_its_folder_and_its_file_are_one_model(judged: Command, tmp_path: Path) -> None:
    told = judged("run", "run", "folder=run/pipeline", "file=one.safetensors", "file.model.config=run/pipeline", *COLOR)
    assert told.splitlines()[:4] == [
        "A 0: run: v_prediction, log-SNR 7.1 to zero SNR (config.yaml)",
        "B 0: run: v_prediction, log-SNR 7.1 to zero SNR (config.yaml)",
        "folder 0: run/pipeline: v_prediction, log-SNR 7.1 to zero SNR (scheduler_config.json)",
        "file 0: one.safetensors: v_prediction, log-SNR 7.1 to zero SNR (keys and metadata)",
    ]
    found = results(tmp_path, "A-B-folder-file")
    assert {metric for metric, _ in found} == {LEVELS, "color/error"}
    assert {row["verdict"] for (_, side), row in found.items() if side == "B"} == {"identical"}
    for row in found.values():
        assert row["mean"] == pytest.approx(row["baseline_mean"], rel=1e-4)
    measured = tmp_path / "judge-A-B-folder-file" / "measured"
    homes = (measured / name for name in ("A-0", "B-1", "folder-2", "file-3"))
    first, *others = (read_items(home, f"{LEVELS}_-5")[0] for home in homes)
    assert len(first) == 3
    for other in others:
        assert other == pytest.approx(first, rel=1e-4)


def test_several_models_of_a_side_are_rows(judged: Command, tmp_path: Path) -> None:
    told = judged("ours=run,run,run", "theirs=run/pipeline,run/pipeline,run/pipeline", "evals=[val_loss]", "name=rows")
    row = results(tmp_path, "rows")[LEVELS, "theirs"]
    assert (row["verdict"], row["seeds"], row["items"]) == ("identical", [0, 1, 2], 3)
    assert "data.held_out=0: all 4 images are looked at as new ones" in told


class ClosedForm(nn.Module):
    """The posterior mean of x0 for latents of a standard normal, alpha x_t, said in any parameterization."""

    def __init__(self, schedule: Schedule, parameterization: Parameterization):
        super().__init__()
        self.schedule, self.parameterization = schedule, parameterization

    def forward(self, xt: Tensor, t: Tensor, context: Tensor, **more: Any) -> tuple[Tensor]:
        level = self.schedule.at(t)
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in (level.alpha, level.sigma))
        x0 = alpha * xt
        return (self.parameterization.target(x0, (xt - alpha * x0) / sigma, level),)


def test_models_of_the_same_x0_are_equal_whatever_they_predict(
    judged: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"v": (ztsnr(scaled_linear()), V()), "eps": (scaled_linear(), Epsilon()), "x0": (scaled_linear(), Sample())}
    for name, (schedule, parameterization) in kinds.items():
        scheduled = schedule.scheduler_config() | {"prediction_type": parameterization.prediction_type}
        folder(made, tmp_path / name, scheduler=scheduled)

    def load(path: Path, config: Path | None) -> Any:
        parts = load_sdxl(path, config=config)
        parts.unet = ClosedForm(*kinds[path.name])  # type: ignore[assignment]
        return parts

    monkeypatch.setattr(measure, "load_sdxl", load)
    sides = [f"{name}={tmp_path / name}" for name in kinds]
    judged(*sides, "evals=[val_loss]", f"metrics={LEVELS},{LEVELS}_6,{LEVELS}_-5", "name=forms")
    rows = results(tmp_path, "forms")
    assert len(rows) == 6
    for row in rows.values():
        assert row["mean"] == pytest.approx(row["baseline_mean"], rel=1e-4)


def test_another_autoencoder_has_no_error_in_common(judged: Command, made: Path, tmp_path: Path) -> None:
    folder(made, tmp_path / "scaled", vae={"scaling_factor": 2.0})
    told = judged("run", str(tmp_path / "scaled"), *COLOR, "name=other")
    rows = results(tmp_path, "other")
    assert rows[LEVELS, "B"]["verdict"] == "not measured" and rows["color/error", "B"]["verdict"] == "one seed only"
    assert "has latents of its own" in told


# --- what models say of themselves ------------------------------------------------------------------------------------


def folder(made: Path, path: Path, **changes: dict[str, Any]) -> Path:
    """A copy of the run's pipeline with changes of its configs by part; the value ... leaves a key out."""
    shutil.copytree(made / "run" / "pipeline", path)
    for part, change in changes.items():
        file = path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        content = json.loads(file.read_text()) | change
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return path


def single(made: Path, path: Path, keys: str = "", spec: str = "") -> Path:
    """The run's single file with these marker keys and this modelspec.prediction_type."""
    tensors = load_file(made / "one.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ("v_pred", "ztsnr")}
    tensors |= {name: torch.empty(0) for name in keys.split()}
    save_file(tensors, path, metadata={"modelspec.prediction_type": spec} if spec else None)
    return path


@pytest.fixture
def refused(judged: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command that must be refused in one line before a weight is read; that line."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(measure, "load_sdxl", never)

    def run(*words: str) -> str:
        told = judged(*words, status=1).strip()
        assert told.startswith("error: ") and len(told.splitlines()) == 1, told
        return told

    return run


OPEN = "is silent on its schedule"


@pytest.mark.parametrize(
    ("keys", "spec", "flags", "told"),
    [
        ("", "", "", "is silent on what it predicts"),
        ("", "v", "", OPEN),
        ("", "", "B.parameterization=v", OPEN),
        ("v_pred", "epsilon", "", "contradicts itself: key v_pred"),
        ("ztsnr", "epsilon", "", "contradicts itself: at zero terminal SNR epsilon is undefined"),
    ],
)
def test_a_single_file_that_is_silent_or_contradicts_itself(
    refused: Command, made: Path, tmp_path: Path, keys: str, spec: str, flags: str, told: str
) -> None:
    file = single(made, tmp_path / "b.safetensors", keys, spec)
    line = refused("run", str(file), "B.model.config=run/pipeline", *flags.split())
    assert told in line and "; set B." in line


@pytest.mark.parametrize(
    ("scheduler", "told", "flag"),
    [
        ({"prediction_type": ...}, "has no prediction_type", "B.parameterization="),
        ({"rescale_betas_zero_snr": ...}, OPEN, "B.schedule="),
        ({"prediction_type": "epsilon"}, "epsilon is undefined", "B.schedule=scaled_linear"),
        ({"beta_schedule": "sigmoid"}, "has no schedule that is known here", "B.schedule="),
    ],
)
def test_a_folder_that_is_silent_or_contradicts_itself(
    refused: Command, made: Path, tmp_path: Path, scheduler: dict[str, Any], told: str, flag: str
) -> None:
    line = refused("run", str(folder(made, tmp_path / "b", scheduler=scheduler)))
    assert told in line and flag in line


@pytest.mark.parametrize(
    ("keys", "spec", "flags", "told"),
    [
        ("", "epsilon", "", "epsilon, log-SNR 7.1 to -5.4 (keys and metadata)"),
        ("v_pred", "", "", "v_prediction, log-SNR 7.1 to -5.4 (keys and metadata)"),
        ("", "", "parameterization=sample schedule=cosine", "sample, log-SNR 10.1 to -19.8"),
        ("v_pred ztsnr", "", "B.parameterization=epsilon B.schedule=scaled_linear", "epsilon, log-SNR 7.1 to -5.4"),
    ],
)
def test_flags_settle_what_a_file_does_not_say(
    made: Path, tmp_path: Path, keys: str, spec: str, flags: str, told: str
) -> None:
    file = single(made, tmp_path / "b.safetensors", keys, spec)
    words = [str(file), str(file), f"A.model.config={made}/run/pipeline", f"B.model.config={made}/run/pipeline"]
    if flags.startswith("B."):
        words += flags.replace("B.", "A.").split()
    _, found = models(arguments([*words, *flags.split()], ""))
    assert told in found.told


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("run", "name two models or more"),
        ("run nowhere", "nowhere: no such model; give a run directory, a diffusers folder or a .safetensors file"),
        ("run evls=[color]", "did you mean the setting 'evals'?"),
        ("run nothing-*", "nothing-*: no such model"),
        ("run new", "new: neither a run directory (config.yaml) nor a diffusers folder"),
        ("run run/pipeline optimizer.lr=1", "no setting or side 'optimizer'"),
        (
            "run run/pipeline B.evals=[color]",
            "B.evals: of one side alone there is parameterization, ",
        ),
        ("run run/pipeline equivalence=much", "much"),
        ("run A=run/pipeline", "'A' cannot be the name of this side"),
        ("run run/pipeline data.dri=new", "data.dri"),
        ("run run/pipeline data.dir=known", "A: run was trained on 4 of these 4 images; set data.dir"),
        ("run one.safetensors", "set B.model.config to a folder"),
        (
            "run run/pipeline schedule=scaled_linear",
            "config.yaml contradicts schedule=...; set A.schedule=... to overrule it",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(refused: Command, words: str, told: str) -> None:
    assert told in refused(*words.split())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"unet": {"in_channels": 16, "out_channels": 16}},
            "has latents of 16 channels; give a model of 4, as SDXL has",
        ),
        ({"unet": {"addition_embed_type": None}}, "SDXL's is 'text_time'"),
        ({"unet": {"sample_size": 128}}, "made for canvases of 1024 pixels, run for 128; set native.resolution=128"),
    ],
)
def test_another_network_is_refused(
    refused: Command, made: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    assert told in refused("run", str(folder(made, tmp_path / "b", **changes)))


def test_rows_are_seeds_where_the_sides_share_one(made: Path) -> None:
    for seed in (5, 7):
        target = made / f"seed{seed}"
        if not target.is_dir():
            shutil.copytree(made / "run", target)
            text = (target / "config.yaml").read_text()
            (target / "config.yaml").write_text(text.replace("\n  seed: 0\n", f"\n  seed: {seed}\n", 1))
    seven, five, zero = (str(made / name) for name in ("seed7", "seed5", "run"))
    found = models(arguments([f"{seven},{five}", f"{zero},{seven}"], ""))
    assert [(model.side, model.row) for model in found] == [("A", 5), ("A", 7), ("B", 0), ("B", 7)]
    found = models(arguments([f"{seven},{five}", zero], ""))
    assert [(model.side, model.row) for model in found] == [("A", 0), ("A", 1), ("B", 0)]
