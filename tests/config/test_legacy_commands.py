"""Command lines of version 0.1 are understood, and say what to type now."""

import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.config import legacy_commands
from nai_xl.config.legacy_commands import understood
from nai_xl.errors import UserError
from tests.config.options import composed


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    legacy_commands._say.cache_clear()


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("run.mixed_precision=bf16", ["precision=bf16"]),
        ("run.mixed_precision=no", ["precision=fp32"]),
        ('run.mixed_precision="no"', ["precision=fp32"]),
        ("++run.mixed_precision=fp16", ["precision=fp16"]),
        ("run.mixed_precision=no,bf16", ["precision=fp32,bf16"]),
        ("run.mixed_precision=choice(bf16,fp16)", ["precision=bf16,fp16"]),
        ("run.mixed_precision=fp8", ["precision=fp8"]),  # Hydra tells which there are
        ("memory=gpu_24gb", ["hardware=gpu_24gb"]),
        ("memory=[gpu_24gb]", ["hardware=gpu_24gb"]),
        ("memory=gpu_24gb,gpu_48gb", ["hardware=gpu_24gb,gpu_48gb"]),
        ("memory=[gpu_24gb],cpu", ["hardware=gpu_24gb,cpu"]),
        ("memory=[cpu,gradient_checkpointing]", ["hardware=cpu", "memory=[sdpa,gradient_checkpointing]"]),
        (
            "memory=[gpu_24gb,sdpa,compile]",
            ["hardware=gpu_24gb", "memory=[sdpa,channels_last,bf16_weights,gradient_checkpointing,compile]"],
        ),
    ],
)
def test_an_override_of_0_1_becomes_todays_and_is_told_once(
    before: str, now: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert understood(["loss=edm", before, "-m"]) == ["loss=edm", *now, "-m"]
    understood([before])
    told = capsys.readouterr()
    assert told.err.splitlines() == [f"{before} is understood as {' '.join(now)}, which is how to write it from now on"]
    assert told.out == ""


@pytest.mark.parametrize(
    "argument",
    [
        "memory=[sdpa]", "memory=[sdpa],[math]", "memory=[]", "memory.compile.mode=default", "precision=bf16",
        "hardware=cpu", "--config-dir", "memory", "data.dir=memory=gpu_24gb", "memory=[gpu", "~run.mixed_precision",
    ],
)  # fmt: skip
def test_everything_else_is_left_as_it_is(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert understood([argument]) == [argument]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argument", ["memory=[sdpa],[gpu_24gb]", "memory=[cpu,gpu_24gb]", "memory=[cpu,math],cpu"])
def test_what_no_override_of_today_says_is_refused(argument: str) -> None:
    with pytest.raises(UserError, match="hardware="):
        understood([argument])


def test_only_the_first_of_several_processes_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert understood(["memory=cpu"]) == ["hardware=cpu"]
    assert capsys.readouterr().err == ""


def test_a_composed_config_understands_them() -> None:
    assert config.compose(["run.mixed_precision=bf16"]) == composed("precision=bf16")
    assert config.compose(["memory=gpu_12gb"]) == composed("hardware=gpu_12gb")
    assert list(config.compose(["memory=[cpu,tf32]"]).memory) == ["sdpa", "tf32"]


def test_a_grid_understands_them() -> None:
    points = list(config.combinations(["run.mixed_precision=no,bf16"]))
    assert [swept for swept, _, _ in points] == [{"precision": "fp32"}, {"precision": "bf16"}]
    assert [cfg.precision.autocast for _, _, cfg in points] == ["no", "bf16"]


def test_a_yaml_of_0_1_is_told_what_to_say_now(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\nrun: {mixed_precision: bf16}\n")
    ((_, choices, cfg),) = config.combinations(["recipe=mine"], tmp_path)
    with pytest.raises(UserError) as told:
        config.check(cfg, choices=choices)
    assert str(told.value) == (
        "run.mixed_precision is a group of its own now: precision=bf16, or `override /precision: bf16` in a yaml"
    )


# --- on a command line ------------------------------------------------------------------------------------------------


def run(arguments: str, monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """The configs that a program is handed for this command line."""
    seen: list[DictConfig] = []
    monkeypatch.setattr(sys, "argv", ["program", *arguments.split()])
    config.entry_point(lambda cfg, choices: seen.append(cfg))()  # type: ignore[func-returns-value]
    return seen


def test_a_program_understands_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (cfg,) = run("run.mixed_precision=bf16 memory=[cpu,tf32]", monkeypatch)
    assert cfg.precision.autocast == "bf16" and list(cfg.memory) == ["sdpa", "tf32"]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_sweep_of_a_program_understands_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arms = run("-m run.mixed_precision=no,bf16 run.seed=1", monkeypatch)
    assert [cfg.precision.autocast for cfg in arms] == ["no", "bf16"]
    assert [OmegaConf.to_container(cfg.sweep.varied) for cfg in arms] == [["precision"], ["precision"]]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("defaults: [{override /memory: [gpu_24gb]}]", "memory=gpu_24gb is hardware=gpu_24gb now"),
        ("run: {mixed_precision: fp16}", "precision=fp16"),
        ("sweep: {arms: [{run.mixed_precision: bf16}]}\nhydra: {mode: MULTIRUN}", "precision=bf16"),
    ],
)
def test_a_yaml_of_0_1_is_refused_in_one_line(
    yaml: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml}\n")
    with pytest.raises(SystemExit) as stopped:
        run(f"--config-dir {tmp_path} experiment=mine", monkeypatch)
    told = capsys.readouterr().err
    assert stopped.value.code == 1 and message in told and len(told.splitlines()) == 1
