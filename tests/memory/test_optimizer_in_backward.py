"""What memory=optimizer_in_backward refuses. How it updates is UpdateInBackward's: tests/optimizer/test_update.py."""

from typing import Any

import pytest

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.memory.optimizer_in_backward import OptimizerInBackward


@pytest.mark.parametrize(
    ("settings", "override"),
    [
        ({"grad_accum": 2, "precision": "no", "world": 1}, "run.grad_accum=1"),
        ({"grad_accum": 1, "precision": "fp16", "world": 1}, "precision=bf16"),
        ({"grad_accum": 1, "precision": "no", "world": 2}, "~memory.optimizer_in_backward"),
    ],
)
def test_what_needs_whole_gradients_is_refused(settings: dict[str, Any], override: str) -> None:
    with pytest.raises(UserError, match=override):
        OptimizerInBackward().refuse(**settings)


def test_the_option_is_this_action() -> None:
    cfg = config.compose(["memory=[optimizer_in_backward]"])
    config.check(cfg)
    assert config.build(cfg.memory) == {"optimizer_in_backward": OptimizerInBackward()}
