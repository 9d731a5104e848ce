"""What a person meets on the command line: one clear message for every mistake, and none of a traceback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nai_xl.train import main
from tests.conftest import SMALL
from tests.test_train import losses, same_weights


def mistake(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told and len(told.splitlines()) == 1, told
    return told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("loss=minsrn", "loss=minsrn: no such option; did you mean 'minsnr'?"),
        ("loss.gama=3", "no parameter 'gama' in min_snr; did you mean 'gamma'?"),
        ("+loss.gama=3", "no parameter 'gama' in min_snr; did you mean 'gamma'?"),
        ("optimizer.lr=fast", "optimizer.lr=fast: input should be a valid number"),
        ("schedule=ztsnr parameterization=epsilon", "Use parameterization=v, or schedule=scaled_linear"),
        ("data=folder data.dir=nowhere", "data.dir=nowhere: no such folder"),
        ("data=folder", "data.dir is missing; set data.dir=..."),
        ("model=sdxl", "model.path is missing; set model.path=..."),
        ("model=sdxl model.path=nowhere", "model.path=nowhere"),
        ("modle=tiny", "no setting 'modle'; did you mean 'model'?"),
        ("+sede=3", "no setting 'sede'"),
        ("run.sede=3", "no parameter 'sede' in RunSettings; did you mean 'seed'?"),
        ("run.seed=1.5", "run.seed=1.5"),
        ("native.resolution=-64", "native.resolution=-64: input should be greater than or equal to 8"),
        ("run.batch_size=0", "run.batch_size=0: input should be greater than or equal to 1"),
        ("run.workers=-1", "run.workers=-1: input should be greater than or equal to 0"),
        ("run.sede=3 loss.gama=1", "run.sede: no parameter 'sede' in RunSettings"),
        ("precision.autocast=bf61", "'no', 'bf16' or 'fp16'"),
        ("run.max_images=null", "one of run.max_images and run.epochs"),
        ("run.chunk=17", "run.chunk=17 must be a multiple"),
        ("memory=[sdpq]", "memory=sdpq: no such option; did you mean 'sdpa'?"),
        ("bucketing.step=30", "multiples of 8"),
        ("captions.dropout=2", "captions.dropout=2.0: must lie in [0, 1]"),
        ("ema.decay=1", "ema.decay=1: input should be less than 1"),
        ("loss._target_=os.system", "plugins=[os]"),
        ("loss._target_=nai_xl.diffusion.loss.nothing", "cannot be loaded"),
        ("output_dir=/proc/none", "set output_dir=DIR"),
        ("data.cache=/proc/none", "data.cache=DIR"),
        ("cache.dir=/proc/none", "set cache.dir=DIR"),
    ],
)
def test_a_mistake_gets_one_line_that_mends_it(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in mistake([*arguments.split(), "tracker=jsonl"], monkeypatch, capsys)


def test_an_empty_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "data.dir=empty: no images" in mistake(["data=folder", "data.dir=empty"], monkeypatch, capsys)


def test_several_mistakes_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "optimizer.lr=fast", "+loss.gama=1"])
    with pytest.raises(SystemExit):
        main()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_sweep_trains_every_combination_and_a_bad_arm_spares_the_others(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forks: None
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["-m", "parameterization=epsilon,v", "run.max_images=2"]
    monkeypatch.setattr(sys, "argv", ["train", *sweep, *SMALL, f"data.dir={images}"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    told = capsys.readouterr()
    assert "FAILED parameterization=epsilon: parameterization=epsilon is undefined" in told.out
    assert "error: 1 of 2 arms failed" in told.err
    assert len(list((tmp_path / "outputs").glob("tiny-ztsnr-v-*/pipeline"))) == 1


def command(images: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "nai_xl.train", *SMALL, f"data.dir={images}", *overrides]


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        metrics = list((folder / "outputs").glob("*/metrics.jsonl"))
        if metrics and len(metrics[0].read_text().splitlines()) >= steps:
            return
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.05)
    raise AssertionError("the run did not begin")


STOPPED = ["run.max_images=48", "run.checkpoint_every=4", "~evals.sample_grid"]


def environment() -> dict[str, str]:
    """That of a command: the checkout is found from any folder."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}


def begin(folder: Path, images: Path) -> "subprocess.Popen[bytes]":
    arguments = command(images, *STOPPED)
    return subprocess.Popen(arguments, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def left_in(folder: Path) -> dict[int, float]:
    """The losses of the one run in this folder."""
    return losses(next((folder / "outputs").glob("*/metrics.jsonl")).parent)


def test_a_stopped_process_is_continued_by_the_same_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., str], forks: None
) -> None:
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    typed(main, *command(images, *STOPPED)[3:])
    whole = left_in(tmp_path / "whole")
    assert list(whole) == list(range(1, 25))
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        cut = tmp_path / how.name
        cut.mkdir()
        process = begin(cut, images)
        wait_for_steps(cut, 6, process)
        process.send_signal(how)
        told = process.communicate(timeout=60)[0].decode()
        if how != signal.SIGKILL:
            assert "the same command goes on from there" in told and process.returncode == 75
        again = begin(cut, images)
        assert again.communicate(timeout=60) and again.returncode == 0
        assert left_in(cut) == whole


def test_a_profiled_run_trains_to_the_same_weights_and_leaves_its_trace_and_summary(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With evaluation inside the window."""
    left = []
    for debug in ("debug=[fast]", "debug=[fast,profile]"):
        folder = tmp_path / str(len(left))
        folder.mkdir()
        monkeypatch.chdir(folder)
        arguments = [*SMALL, f"data.dir={images}", debug, "run.max_images=16", "run.checkpoint_every=4"]
        monkeypatch.setattr(sys, "argv", ["train", *arguments, "evals.sample_grid.every=6"])
        main()
        left.append(next((folder / "outputs").glob("tiny-*")))
    plain, profiled = left
    assert plain.name == profiled.name  # one signature: the profile is not part of what a run is
    assert same_weights(plain, profiled) and losses(plain) == losses(profiled)
    assert not (plain / "profile").exists()
    names = ["summary_step_00000008.txt", "trace_step_00000008.json.gz"]
    assert sorted(path.name for path in (profiled / "profile").iterdir()) == names
    told = (profiled / "profile" / names[0]).read_text()
    assert "profile of steps 5 to 8" in told and "profile of steps 5 to 8" in capsys.readouterr().out
    for part in ("compute-bound", "memory-bound", "data wait", "convolution_backward", "_fused_adamw_", "item()"):
        assert part in told
