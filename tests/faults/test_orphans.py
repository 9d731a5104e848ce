"""Whoever has started a process is killed: the process stops in order, and the same command goes on."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import nai_xl
from nai_xl.distributed import launch
from nai_xl.distributed.launch import SWEEP, Launcher, Process, remarks, stopped_before
from nai_xl.errors import Stopped
from nai_xl.record.arm import read_arm
from nai_xl.training.processes import decline_restart
from tests.conftest import SMALL
from tests.test_cli import environment
from tests.test_train import losses

FORK = multiprocessing.get_context("fork")


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 180
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_the_end_of_torchrun_is_noticed_and_that_of_a_shell_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Launcher.found({"TORCHELASTIC_RUN_ID": "none"})
    assert found and found.gone() is None
    monkeypatch.setattr(os, "getppid", lambda: 1)  # whom the system gives children that are left behind
    assert found.gone() == f"torchrun (pid {nai_xl.PARENT}) has ended"
    assert not Launcher.found({}) and Launcher.found({}).gone() is None


def test_the_end_of_a_sweep_is_noticed_although_torchrun_is_between() -> None:
    sweep = FORK.Process(target=time.sleep, args=(600,), daemon=True)
    sweep.start()
    named = str(Process.of(sweep.pid or 0))
    found = Launcher.found({SWEEP: named})
    assert found and found.gone() is None
    sweep.kill()
    until(lambda: found.gone(), "the sweep's end")  # before anyone has waited for it, too
    sweep.join()
    assert found.gone() == f"the sweep (pid {sweep.pid}) has ended"
    again = Launcher.found({SWEEP: f"{os.getpid()}@{named.partition('@')[2]}"})  # an id that is in use again
    assert again.gone()


def test_a_restart_of_a_run_that_a_signal_has_stopped_is_declined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = psutil.Process(nai_xl.PARENT).create_time()
    under_torchrun = {"TORCHELASTIC_RUN_ID": "x"}
    assert stopped_before(began + 1, under_torchrun)
    assert not stopped_before(began - 1, under_torchrun)  # an earlier command's: this one goes on
    assert not stopped_before(None, under_torchrun) and not stopped_before(began + 1, {})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(Stopped):
        decline_restart(began + 1)
    assert "torchrun does not restart it" in capsys.readouterr().err
    decline_restart(None)


def test_restarts_that_cannot_meet_are_said() -> None:
    shared = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in remarks(shared)[0]
    assert not remarks({**shared, "TORCHELASTIC_USE_AGENT_STORE": "False"}) and not remarks({})
    assert not remarks({**shared, "TORCHELASTIC_MAX_RESTARTS": "0"})


def test_arms_of_a_sweep_that_was_killed_stop_in_order_and_the_next_command_goes_on(
    images: Path, tmp_path: Path, forks: None
) -> None:
    """The next command begins while the arm that was left is still saving."""
    slow = "import time\nfrom nai_xl.diffusion.loss import min_snr\n\n\ndef weight(level, p, *, gamma: float = 5.0):\n"
    (tmp_path / "slow.py").write_text(
        f"{slow}    time.sleep(0.3 if level.alpha.numel() == 2 else 0)\n    return min_snr(level, p, gamma=gamma)\n"
    )
    here = environment()
    here["PYTHONPATH"] += f":{tmp_path}"
    loss = ["plugins=[slow]", "loss._target_=slow.weight", "loss.gamma=5"]
    command = [sys.executable, "-m", "nai_xl.train", "-m", *SMALL, f"data.dir={images}", *loss, "run.max_images=24"]

    def begin() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, cwd=tmp_path, env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def steps() -> int:
        return sum(len(path.read_text().splitlines()) for path in tmp_path.glob("outputs/*/metrics.jsonl"))

    sweep = begin()
    until(lambda: steps() >= 2, "the arm's first steps")
    (arm,) = psutil.Process(sweep.pid).children()
    sweep.send_signal(signal.SIGKILL)
    sweep.communicate()
    again = begin()
    arm.wait(60) if arm.is_running() else None
    (home,) = tmp_path.glob("outputs/*-*")
    told = (home / "log.txt").read_text()
    assert f"the sweep (pid {sweep.pid}) has ended: finishing the step, saving, stopping" in told
    assert "the same command goes on from there" in told
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0 and "FINISHED" in out and "FAILED" not in out, out + err
    found = read_arm(home)
    assert found and (found.status, found.steps) == ("FINISHED", 12)
    assert list(losses(home)) == list(range(1, 13))
    rows = (home / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 12 and "continuing after" in (home / "log.txt").read_text()
    assert launch.SWEEP not in os.environ
