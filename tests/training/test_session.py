"""One training of one run."""

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig
from torch import nn

from nai_xl.errors import UserError
from nai_xl.memory.action import MemoryAction
from nai_xl.train import train


class Replacing(MemoryAction):
    """Puts a new parameter in the place of one that the adapter has captured."""

    tolerance = 0.0

    def apply(self, model: Any) -> None:
        model.conv_in.bias = nn.Parameter(model.conv_in.bias.detach().clone())


def test_an_action_that_replaces_what_is_trained_is_refused(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nai_xl.memory.attention.Sdpa", Replacing)
    with pytest.raises(
        UserError, match=r"^memory: Replacing replaces parameters .* leave it out of 'memory=\[\.\.\.\]'$"
    ):
        train(small("run.max_images=2"), {})
