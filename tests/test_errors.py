"""From a function's complaint about its argument to the config key that sets it."""

import pytest

from nai_xl.errors import ChoiceError, UserError, keyed, under


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("gamma=0: must be positive", "loss.gamma=0: must be positive"),
        ("base.beta_start=2: too large", "loss.base.beta_start=2: too large"),
        ("base: has no table", "loss.base: has no table"),
        ("the weight is 0: nothing is trained", "loss: the weight is 0: nothing is trained"),
        ("alpha^2 must fall", "loss: alpha^2 must fall"),
        ("Invalid value: 3", "loss: Invalid value: 3"),
    ],
)
def test_the_key_comes_before_the_parameter(message: str, told: str) -> None:
    assert under("loss", message) == told


def test_a_value_error_becomes_the_user_s_and_others_pass() -> None:
    with pytest.raises(UserError, match=r"^sampling\.steps=0: must be at least 1$") as told, keyed("sampling"):
        raise ValueError("steps=0:\n must be at least 1")
    assert isinstance(told.value.__cause__, ValueError)
    with pytest.raises(RuntimeError), keyed("sampling"):
        raise RuntimeError("steps")


def test_a_refused_choice_can_be_told_under_another_name() -> None:
    error = ChoiceError("weighting", "gamma=0: must be positive")
    assert (
        str(error) == "weighting.gamma=0: must be positive" and error.told("loss") == "loss.gamma=0: must be positive"
    )
    assert str(ChoiceError("p", "is undefined", value="epsilon")) == "p=epsilon is undefined"
