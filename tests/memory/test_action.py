"""What the options say of themselves, and that others ask them that and not their names."""

import functools
from typing import Any

import pytest
import torch

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.memory.action import MemoryAction
from nai_xl.memory.activation_budget import ActivationBudget
from nai_xl.memory.attention import Sdpa
from nai_xl.memory.bf16_weights import Bf16Weights
from nai_xl.memory.compatibility import autocast, refuse_misfits
from nai_xl.optimizer.adamw_bf16 import AdamWBf16
from tests.memory.test_memory import OPTIONS, actions, refusal

ABLE = [option for option in OPTIONS if refusal(option) is None]


class Own(MemoryAction):
    """What a plug-in might bring: compiled bfloat16 blocks with attention of their own."""

    tolerance = 1e-2
    compiles = True
    weights_in = torch.bfloat16

    @property
    def attention(self) -> str:
        return "own"


@functools.cache
def the_action(option: str) -> MemoryAction:
    (action,) = actions(f"[{option}]")
    return action


@pytest.mark.parametrize("option", OPTIONS)
def test_an_action_is_taken_out_as_messages_say(option: str) -> None:
    assert option not in config.compose([f"memory=[sdpa,{option}]", f"~memory.{option}"]).memory


@pytest.mark.parametrize("option", ABLE)
def test_an_option_is_one_action_that_states_its_tolerance(option: str) -> None:
    action = the_action(option)
    assert isinstance(action, MemoryAction) and 0 <= action.tolerance < 0.1
    assert action.attention in (None, option)


def named(member: str, value: Any) -> set[str]:
    return {option for option in ABLE if getattr(the_action(option), member) == value}


def test_which_options_are_what() -> None:
    assert named("changes_weights", False) == {"gradient_checkpointing", "offload_activations"}
    assert named("compiles", True) == {"compile"}
    assert named("updates_in_backward", True) == {"optimizer_in_backward"}
    assert named("weights_in", torch.bfloat16) == {"bf16_weights"}
    assert named("activation_budget", 0.5) == {"activation_budget"}
    assert named("attention", None) == {*ABLE} - {"sdpa", "flash", "math", "cudnn", "attention_slicing"}


def test_another_action_counts_by_what_it_does() -> None:
    with pytest.raises(UserError, match=r"memory=\[sdpa,own\]: only one"):
        refuse_misfits([Sdpa(), Own()], AdamWBf16, "no")
    refuse_misfits([ActivationBudget(), Own()], AdamWBf16, "no")
    assert autocast([Own()], "bf16") == "no"


def test_half_precision_kernels_need_half_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = Sdpa("flash")
    refuse_misfits([flash], torch.optim.AdamW, "no")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"memory=\[flash\] computes in half precision; set precision=bf16"):
        refuse_misfits([flash], torch.optim.AdamW, "no")
    refuse_misfits([Sdpa("math")], torch.optim.AdamW, "no")
    refuse_misfits([flash], torch.optim.AdamW, "bf16")
    refuse_misfits([flash, Bf16Weights()], AdamWBf16, "no")
