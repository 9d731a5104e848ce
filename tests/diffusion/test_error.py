"""Pointwise errors against torch's losses and their closed forms."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional

from nai_xl import config
from nai_xl.diffusion import error as pointwise
from nai_xl.diffusion import loss, timesteps
from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.parameterization import V
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.errors import ChoiceError
from nai_xl.interfaces import PointwiseError

SCHEDULE = ztsnr(scaled_linear())
LEVEL = SCHEDULE.at(torch.tensor([0, 250, 500, 999]))
OPTIONS = sorted(path.stem for path in (config.conf_dir() / "error").glob("*.yaml"))


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 4, 4, 6, 5, generator=generator)
    return prediction, target


def single(error: PointwiseError, difference: float, t: int = 0) -> float:
    level = SCHEDULE.at(torch.tensor([t]))
    return error(torch.full((1, 1, 1, 1), difference), torch.zeros(1, 1, 1, 1), level).item()


@pytest.mark.parametrize("threshold", [0.01, 0.1, 1.0, 3.0])
def test_errors_are_torch_s_losses_up_to_the_stated_factor(threshold: float) -> None:
    prediction, target = pair()
    rows = list(zip(prediction, target, strict=True))
    mse = torch.stack([functional.mse_loss(p, t) for p, t in rows])
    huber = 2 * torch.stack([functional.huber_loss(p, t, delta=threshold) for p, t in rows])
    smooth = 2 * torch.stack([functional.smooth_l1_loss(p, t, beta=threshold) for p, t in rows])
    torch.testing.assert_close(pointwise.mse(prediction, target, LEVEL), mse)
    torch.testing.assert_close(pointwise.huber(prediction, target, LEVEL, delta=threshold), huber)
    torch.testing.assert_close(pointwise.smooth_l1(prediction, target, LEVEL, beta=threshold), smooth)


def test_scheduled_huber_is_the_published_formula_with_its_exponential_threshold() -> None:
    prediction, target = (x.double().numpy() for x in pair())
    delta = np.exp(np.log(0.02) * np.array([0, 250, 500, 999]) / 1000)[:, None, None, None]
    expected = (2 * delta**2 * (np.sqrt(1 + ((prediction - target) / delta) ** 2) - 1)).mean(axis=(1, 2, 3))
    found = pointwise.scheduled_huber(*pair(), LEVEL, delta=0.02)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@given(st.floats(-4, 4), st.integers(0, 999))
def test_every_error_is_even_and_between_zero_and_the_squared_error(difference: float, t: int) -> None:
    squared = single(pointwise.mse, difference, t)
    for error in (pointwise.huber, pointwise.scheduled_huber):
        value = single(error, difference, t)
        assert 0 <= value <= squared * (1 + 1e-5)
        assert value == single(error, -difference, t)


@pytest.mark.parametrize("t", [0, 400, 999])
@pytest.mark.parametrize("difference", [0.003, 0.5, 2.0])
def test_large_thresholds_give_the_squared_error_and_small_ones_the_absolute(difference: float, t: int) -> None:
    squared = difference**2
    assert single(functools.partial(pointwise.huber, delta=1e3), difference, t) == pytest.approx(squared, rel=1e-5)
    assert single(functools.partial(pointwise.smooth_l1, beta=1e-6), difference) == pytest.approx(
        2 * difference, rel=1e-3
    )
    tiny = single(functools.partial(pointwise.huber, delta=1e-6), difference) / 1e-6
    assert tiny == pytest.approx(2 * difference, rel=1e-3)
    scheduled = single(functools.partial(pointwise.scheduled_huber, delta=1e6), difference, 999)
    assert scheduled == pytest.approx(squared, rel=1e-5)
    sharp = single(functools.partial(pointwise.scheduled_huber, delta=1e-6), difference, 999)
    assert sharp / math.exp(math.log(1e-6) * 0.999) == pytest.approx(2 * difference, rel=1e-2)


def test_scheduled_threshold_falls_with_noise_below_one_and_rises_above_one() -> None:
    falling = [single(functools.partial(pointwise.scheduled_huber, delta=0.1), 1.0, t) for t in (0, 300, 999)]
    rising = [single(functools.partial(pointwise.scheduled_huber, delta=10.0), 1.0, t) for t in (0, 300, 999)]
    constant = [single(functools.partial(pointwise.scheduled_huber, delta=1.0), 1.0, t) for t in (0, 300, 999)]
    assert falling == sorted(falling, reverse=True) and rising == sorted(rising)
    assert constant == [pytest.approx(2 * (2**0.5 - 1))] * 3
    assert falling[0] == rising[0] == constant[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_error_option_is_finite_with_a_finite_gradient(name: str) -> None:
    error = config.build(OmegaConf.load(config.conf_dir() / "error" / f"{name}.yaml"))
    for scale in (0.0, 1e-12, 1.0, 1e6):
        prediction = (scale * pair()[0]).requires_grad_()
        values = error(prediction, torch.zeros(4, 4, 6, 5), LEVEL)
        values.sum().backward()
        assert values.shape == (4,) and values.isfinite().all()
        assert prediction.grad is not None and prediction.grad.isfinite().all()


@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision_prediction_gives_a_single_precision_error(name: str) -> None:
    error = config.build(OmegaConf.load(config.conf_dir() / "error" / f"{name}.yaml"))
    prediction, target = pair()
    assert error(prediction.bfloat16(), target, LEVEL).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (functools.partial(pointwise.huber, delta=0.0), "delta"),
        (functools.partial(pointwise.smooth_l1, beta=-1.0), "beta"),
        (functools.partial(pointwise.scheduled_huber, delta=0.0), "delta"),
        (functools.partial(pointwise.scheduled_huber, timesteps=0), "timesteps"),
    ],
)
def test_threshold_without_meaning_is_refused_before_anything_is_loaded(error: PointwiseError, name: str) -> None:
    with pytest.raises(ChoiceError, match=rf"^error\.{name}=.*: must be positive and finite"):
        Objective(SCHEDULE, V(), timesteps.uniform, loss.uniform, error)


def test_a_scheduled_threshold_for_another_schedule_is_refused() -> None:
    """On 400 timesteps it would end at delta^0.4 and never be as small as asked for."""
    short = scaled_linear(timesteps=400)
    with pytest.raises(ChoiceError, match=r"^error\.timesteps=1000: the schedule has 400; set error\.timesteps=400"):
        Objective(short, V(), timesteps.uniform, loss.uniform, pointwise.scheduled_huber)
    error = functools.partial(pointwise.scheduled_huber, timesteps=400)
    Objective(short, V(), timesteps.uniform, loss.uniform, error)
    assert SCHEDULE.at(torch.tensor([0.5])).timesteps == 1000
