"""Launchers: two machines, of which one loses its process on the way, train what one process trains."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from nai_xl.record.arm import read_arm
from nai_xl.train import train
from tests.conftest import SMALL
from tests.test_train import losses

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
FALLS = '''
import os
import signal

from nai_xl.diffusion.loss import min_snr

CALLS = []


def weight(level, p, *, gamma: float = 5.0):
    """minsnr, in a process that is killed in its fourth step if it is rank 1 and torchrun has not restarted it."""
    CALLS.extend([1] if level.alpha.numel() == 2 else [])  # of a batch, and not for the figure of the method
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if len(CALLS) == 4 and os.environ.get("RANK") == "1" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    return min_snr(level, p, gamma=gamma)
'''
LOSS = ["plugins=[falls]", "loss._target_=falls.weight"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_nodes_of_which_one_is_killed_and_restarted_train_like_one_process(
    small: Callable[..., DictConfig], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents of torchrun on this machine, with the lines of docs/distributed.md."""
    (tmp_path / "falls.py").write_text(FALLS)
    monkeypatch.syspath_prepend(tmp_path)
    common = ["run.chunk=4", "run.max_images=24", "run.checkpoint_every=2", "evals.sample_grid.every=100", *LOSS]
    expected = losses(train(small(*common, "run.batch_size=4", "output_dir=one"), {}))

    line = re.search(r"^    (torchrun --nnodes 2 .*?[^\\])$", DOCS, re.MULTILINE | re.DOTALL)
    assert line
    typed = line[1].replace("FIRST_HOST", "localhost").replace("29400", str(free_port()))
    options = shlex.split(typed.replace("\\\n", ""))
    options = options[1 : options.index("-m")]
    options[options.index("--nproc-per-node") + 1] = "1"
    run = ["nai_xl.train", *SMALL, f"data.dir={images}", *common, "run.batch_size=2", "distributed=ddp"]
    environment = {
        **os.environ,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
    }
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, "-m", *run, "output_dir=two"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    told = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    (home,) = (tmp_path / "two").iterdir()
    found = losses(home)
    assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    assert "continuing after 2" in "".join(told)
    assert re.search(r"error: rank 1 \(.*, pid \d+\) has died; it was: ", "".join(told))
    arm = read_arm(home)
    assert arm and (arm.status, arm.steps, arm.images) == ("FINISHED", 6, 24)


@pytest.mark.parametrize(("status", "queued"), [(75, True), (0, False), (1, False)])
def test_the_slurm_script_queues_a_run_again_that_was_stopped_in_order(
    status: int, queued: bool, tmp_path: Path
) -> None:
    """With stand-ins for SLURM's commands and for python: what the task gets, and what becomes of its status."""
    stand_ins = {
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> calls.txt; fi',
        "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 "$@"',
        "python": f'echo "$MASTER_ADDR $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_PORT: $*" > task.txt; exit {status}',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "42", "SLURM_NTASKS": "16"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **slurm}
    command = ["bash", str(ROOT / "docs/slurm.sh"), "distributed=ddp", "data.dir=a b"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=30)
    assert done.returncode == status
    assert (tmp_path / "task.txt").read_text() == "node7 3 1 16 20042: -m nai_xl.train distributed=ddp data.dir=a b\n"
    calls = tmp_path / "calls.txt"
    assert (calls.read_text() == "requeue 42\n") if queued else not calls.exists()


def test_the_slurm_script_outlives_the_signals_that_are_for_its_ranks(tmp_path: Path) -> None:
    stand_ins = {
        "scontrol": "echo node7",
        "srun": "trap 'echo asked > asked.txt; exit 0' TERM; touch begun; while true; do sleep 0.05; done",
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node7", "SLURM_JOB_ID": "42", "SLURM_NTASKS": "1"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **slurm}
    script = subprocess.Popen(["bash", str(ROOT / "docs/slurm.sh")], cwd=tmp_path, env=environment)
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    script.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert script.poll() is None
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 0 and (tmp_path / "asked.txt").exists()
