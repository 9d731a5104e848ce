"""What composing an objective refuses, in overrides that a person can type."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nai_xl.diffusion import error, loss, timesteps
from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.parameterization import Epsilon, V
from nai_xl.diffusion.schedule import high_sigma, scaled_linear, shifted, ztsnr
from nai_xl.errors import UserError
from nai_xl.interfaces import NoiseLevel, Parameterization
from nai_xl.task.objective import compose_objective, groups, headline


def compose(**changed: Any) -> Objective:
    chosen = {
        "schedule": ztsnr(scaled_linear()),
        "parameterization": V(),
        "timesteps": timesteps.uniform,
        "weighting": loss.uniform,
    }
    return compose_objective(changed.pop("make", Objective), 1024, **(chosen | changed))


def ratio(level: NoiseLevel, p: Parameterization) -> Tensor:
    return 1 / level.snr


def nothing(level: NoiseLevel, p: Parameterization) -> Tensor:
    return 0 * level.alpha


class Bare(nn.Module):
    """A module that lacks what learned weightings have."""

    def forward(self, level: NoiseLevel, p: Parameterization) -> Tensor:
        return torch.ones_like(level.alpha)


def infinite(prediction: Tensor, target: Tensor, level: NoiseLevel) -> Tensor:
    return prediction.flatten(1).mean(1) / 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"parameterization": Epsilon()},
            r"^parameterization=epsilon is undefined on a schedule that ends at zero SNR: pure noise says nothing of x0"
            r"\. Use parameterization=v, or schedule=scaled_linear\.$",
        ),
        ({"weighting": ratio}, r"^loss: the value at timestep 999 is inf.*loss=uniform.*schedule=scaled_linear"),
        ({"weighting": Bare()}, r"^loss: a module needs penalty and parameter_group; derive from LearnedWeighting$"),
        ({"weighting": nothing}, r"^loss: the weight is 0 at every timestep.*use loss=uniform"),
        ({"error": infinite}, r"^error: the value at timestep 0 is inf.*use error=mse"),
        (
            {"make": functools.partial(Objective, normalize_weights=True), "weighting": loss.Uncertainty()},
            r"^objective\.normalize_weights=true .*; set objective\.normalize_weights=false$",
        ),
        ({"weighting": functools.partial(loss.min_snr, gamma=0)}, r"^loss\.gamma=0: must be positive and finite$"),
        ({"error": functools.partial(error.huber, delta=-1)}, r"^error\.delta=-1: must be positive and finite$"),
        ({"timesteps": timesteps.InferenceGrid(1001)}, r"^timesteps\.steps=1001: the schedule has only 1000"),
    ],
)
def test_a_refusal_names_the_override(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(**changed)


def test_choices_are_tried_on_the_native_canvas_too() -> None:
    """There the noise is shifted so far that a weight overflows; on the table itself it does not."""
    schedule = shifted(high_sigma(scaled_linear(), sigma_max=1e15), resolution=1)

    def steep(level: NoiseLevel, p: Parameterization) -> Tensor:
        return 1e-3 / level.snr

    Objective(schedule, V(), timesteps.uniform, steep)
    with pytest.raises(UserError, match=r"^loss: the value at timestep 992 is inf"):
        compose_objective(
            Objective, 100_000, schedule=schedule, parameterization=V(), timesteps=timesteps.uniform, weighting=steep
        )


def test_settings_are_those_of_the_partial() -> None:
    made = compose(make=functools.partial(Objective, normalize_weights=True, micro_conditioning=False))
    assert made.normalize_weights and not made.micro_conditioning
    assert torch.equal(made.schedule.at(torch.tensor([999])).alpha, torch.zeros(1))


def test_a_headline_names_the_method_s_groups_that_are_not_swept() -> None:
    assert list(groups().values()) == ["schedule", "parameterization", "timesteps", "loss", "error"]
    choices = {"model": "tiny", "schedule": "ztsnr", "loss": "minsnr", "parameterization": "v"}
    assert headline(choices) == "schedule ztsnr, parameterization v, loss minsnr"
    assert headline(choices, swept=["loss", "run.seed"]) == "schedule ztsnr, parameterization v"
