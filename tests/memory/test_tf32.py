"""TensorFloat-32 is on for a run and off after it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from nai_xl.memory import process_wide
from nai_xl.memory.tf32 import Tf32
from tests.test_train import run

Compose = Callable[..., DictConfig]


def test_tf32_ends_with_the_run() -> None:
    def state() -> tuple[bool, bool, str]:
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        )

    before = state()
    with process_wide.restored():
        Tf32().apply(nn.Identity())
        assert state() == (True, True, "high")
    assert state() == before == (False, True, "highest")


def test_arms_of_a_sweep_do_not_hand_it_on(small: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    from nai_xl.diffusion.objective import Objective

    seen: list[bool] = []
    original = Objective.__call__

    def spy(self: Objective, *args: Any) -> Any:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return original(self, *args)

    monkeypatch.setattr(Objective, "__call__", spy)
    for arm in ("tf32", ""):
        run(small(f"memory=[{arm}]", "run.max_images=2", "~evals.sample_grid", f"name=arm{arm}"))
    assert seen == [True, False]
