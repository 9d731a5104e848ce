"""v, epsilon and sample against diffusers, Karras' form of v, and brute force."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.interfaces import Parameterization

FINITE, ZERO_TERMINAL = scaled_linear(), ztsnr(scaled_linear())
ALL = torch.arange(1000)
every = pytest.mark.parametrize("p", [V(), Epsilon(), Sample()], ids=lambda p: p.prediction_type)


def normal(seed: int, count: int = 1000) -> Tensor:
    return torch.randn(count, 4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_v_target_is_diffusers_velocity() -> None:
    oracle = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    x0, noise = normal(0).float(), normal(1).float()
    found = V().target(x0, noise, ZERO_TERMINAL.at(ALL))
    torch.testing.assert_close(found, oracle.get_velocity(x0, noise, ALL), atol=1e-5, rtol=0)


def test_epsilon_and_sample_targets_are_the_noise_and_the_image() -> None:
    x0, noise, level = normal(0), normal(1), FINITE.at(ALL)
    assert torch.equal(Epsilon().target(x0, noise, level), noise)
    assert torch.equal(Sample().target(x0, noise, level), x0)


@every
def test_exact_prediction_gives_the_image_back(p: Parameterization) -> None:
    x0, noise, level = normal(0).float(), normal(1).float(), FINITE.at(ALL)
    xt = FINITE.add_noise(x0, noise, level)
    torch.testing.assert_close(p.to_x0(xt, p.target(x0, noise, level), level), x0, atol=5e-5, rtol=0)


@pytest.mark.parametrize("p", [V(), Sample()], ids=lambda p: p.prediction_type)
def test_exact_prediction_gives_the_image_back_from_pure_noise(p: Parameterization) -> None:
    x0, noise, level = normal(0).float(), normal(1).float(), ZERO_TERMINAL.at(ALL)
    xt = ZERO_TERMINAL.add_noise(x0, noise, level)
    assert torch.equal(xt[-1], noise[-1])
    found = p.to_x0(xt, p.target(x0, noise, level), level)
    torch.testing.assert_close(found, x0, atol=5e-6, rtol=0)
    assert p.defined_at_zero_snr


def test_v_is_karras_preconditioning_with_unit_data_variance() -> None:
    level = FINITE.at(ALL)
    s = (level.sigma.double() / level.alpha.double()).view(-1, 1, 1, 1)
    scaled, network = normal(2), normal(3)  # scaled = x0 + s n, as EDM writes a noised image
    c_skip, c_out, c_in = 1 / (s**2 + 1), -s / (s**2 + 1).sqrt(), 1 / (s**2 + 1).sqrt()
    expected = c_skip * scaled + c_out * network
    torch.testing.assert_close(V().to_x0(c_in * scaled, network, level), expected, atol=1e-5, rtol=1e-5)


@every
def test_x0_error_scale_is_the_measured_ratio_of_squared_errors(p: Parameterization) -> None:
    xt, prediction, error, level = normal(0), normal(1), normal(2), FINITE.at(ALL)
    moved = p.to_x0(xt, prediction + error, level) - p.to_x0(xt, prediction, level)
    measured = moved.square().sum((1, 2, 3)) / error.square().sum((1, 2, 3))
    torch.testing.assert_close(p.x0_error_scale(level).double(), measured, rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", [V(), Sample()], ids=lambda p: p.prediction_type)
def test_x0_error_scale_is_one_at_zero_snr(p: Parameterization) -> None:
    assert p.x0_error_scale(ZERO_TERMINAL.at(torch.tensor([999]))) == 1


def test_predictions_carry_diffusers_names() -> None:
    for p in (V(), Epsilon(), Sample()):
        DDPMScheduler(prediction_type=p.prediction_type).step(torch.zeros(1, 4, 2, 2), 0, torch.zeros(1, 4, 2, 2))
