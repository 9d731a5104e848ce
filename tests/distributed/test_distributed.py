"""Two processes on this machine's CPU: the same run as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.test_train import losses

ROOT = Path(__file__).parents[2]


def run(folder: Path, images: Path, processes: int, *overrides: str) -> Path:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "nai_xl.train", *SMALL, f"data.dir={images}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    folder.mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((folder / "outputs").iterdir())


def test_two_processes_train_like_one(images: Path, tmp_path: Path) -> None:
    common = ["run.chunk=4", "run.checkpoint_every=2"]
    one = losses(run(tmp_path / "one", images, 1, *common, "run.max_images=24", "run.batch_size=4"))
    ddp = [*common, "run.batch_size=2", "distributed=ddp"]
    run(tmp_path / "two", images, 2, *ddp, "run.max_images=12")
    two = losses(run(tmp_path / "two", images, 2, *ddp, "run.max_images=24"))
    assert list(two) == list(one) == [1, 2, 3, 4, 5, 6]
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
