"""Programs: what a job is handed, and plug-ins on a command line. Mistakes are told in tests/test_cli.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from nai_xl import config
from nai_xl.errors import UserError

Handed = list[tuple[DictConfig, dict[str, str]]]


@pytest.fixture
def handed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Handed:
    monkeypatch.chdir(tmp_path)
    return []


def run(handed: Handed, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that only notes what it is handed; it dislikes the seed 13."""

    def job(cfg: DictConfig, choices: dict[str, str]) -> float | None:
        if cfg.run.seed == 13:
            raise UserError("unlucky")
        handed.append((cfg, choices))
        return None

    monkeypatch.setattr(sys, "argv", ["program", *arguments.split()])
    config.entry_point(job)()


def test_a_job_is_handed_the_config_and_its_choices(handed: Handed, monkeypatch: pytest.MonkeyPatch) -> None:
    run(handed, "loss=edm memory=[sdpa,tf32] debug=fast", monkeypatch)
    ((cfg, choices),) = handed
    assert cfg.loss.sigma_data == 1.0 and "hydra" not in cfg
    assert (choices["loss"], choices["memory"], choices["debug"]) == ("edm", "sdpa, tf32", "fast")


def test_a_mistake_of_the_user_ends_with_status_1(
    handed: Handed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(handed, "run.seed=13", monkeypatch)
    assert stopped.value.code == 1 and not handed
    assert capsys.readouterr().err == "error: unlucky\n"


def test_among_several_processes_it_ends_at_once(
    handed: Handed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        run(handed, "-m run.seed=13,1", monkeypatch)
    assert stopped.value.code == 1 and not handed
    assert capsys.readouterr().err.startswith("error: unlucky")


def test_a_group_of_a_plug_in_is_accepted(handed: Handed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "extras").mkdir(parents=True)
    (tmp_path / "conf" / "extras" / "big.yaml").write_text("width: 3\n")
    run(handed, "--config-dir conf +extras=big", monkeypatch)
    run(handed, "+extras=big hydra.searchpath=[file://conf]", monkeypatch)
    for cfg, choices in handed:
        assert cfg.extras.width == 3 and choices["extras"] == "big"
    assert len(handed) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("+extras=bigg", "extras=bigg: no such option; did you mean 'big'?"),
        ("extra=big", "no setting 'extra'; did you mean 'extras'?"),
        ("+extras=big +extra.width=1", "no setting 'extra'; did you mean 'extras'?"),
        ("+extras=big extras.widht=1", "no setting 'extras.widht'; did you mean 'width'?"),
    ],
)
def test_a_mistake_in_a_group_of_a_plug_in_is_told(
    arguments: str,
    message: str,
    handed: Handed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "conf" / "extras").mkdir(parents=True)
    (tmp_path / "conf" / "extras" / "big.yaml").write_text("width: 3\n")
    with pytest.raises(SystemExit):
        run(handed, f"--config-dir conf {arguments}", monkeypatch)
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_weighting_from_outside_needs_a_function_and_a_yaml(tmp_path: Path, forks: None) -> None:
    (tmp_path / "mine.py").write_text(
        "def halved(level, p, *, factor: float = 0.5):\n    return factor * level.alpha\n"
    )
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "halved.yaml").write_text("_target_: mine.halved\n_partial_: true\n")
    arguments = (
        "-m --config-dir conf loss=halved,minsnr plugins=[mine] debug=fast tracker=jsonl run.max_images=16".split()
    )
    command = [sys.executable, "-m", "nai_xl.train", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for loss in ("halved", "minsnr"):
        assert len(list((tmp_path / "outputs").glob(f"tiny-ztsnr-v-{loss}-*/pipeline"))) == 1
