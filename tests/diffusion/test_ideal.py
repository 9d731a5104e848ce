"""Closed forms of Gaussian fields against covariance matrices, and against the project's sampler step by step."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nai_xl.diffusion.ideal import Law, flow, gain, power_spectrum, sampled, sigma_max, unknown
from nai_xl.diffusion.parameterization import Epsilon, V
from nai_xl.diffusion.sampling import Method, Sampling, sample_latents
from nai_xl.diffusion.schedule import high_sigma, scaled_linear, shifted, ztsnr
from nai_xl.interfaces import NoiseLevel, Parameterization, Schedule

FINITE, ZERO = scaled_linear(), ztsnr(scaled_linear())
MEAN = torch.tensor([0.5, -0.5, 0.0, 1.0], dtype=torch.float64)[:, None, None]
VARIANCES = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)[:, None, None]


def law(height: int, width: int, power: float = 2.0) -> Law:
    """Channels of four variances."""
    return Law(MEAN, VARIANCES * power_spectrum(height, width, power))


def covariance(spectrum: Tensor) -> Tensor:
    """[n,n] between the values of one channel, by the definition: a sum of cosines over all modes."""
    height, width = spectrum.shape
    y, x = (
        axis.flatten().double() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    whole = torch.zeros(height * width, height * width, dtype=torch.float64)
    for v in range(height):
        for u in range(width):
            phase = 2 * torch.pi * (v * (y[:, None] - y) / height + u * (x[:, None] - x) / width)
            whole += spectrum[v, u] * phase.cos()
    return whole / (height * width)


def level_of(alpha: float) -> NoiseLevel:
    one = torch.tensor([alpha], dtype=torch.float64)
    return NoiseLevel(torch.zeros(1), one, (1 - one.square()).sqrt())


def test_the_spectrum_is_a_power_law_of_mean_one() -> None:
    spectrum = power_spectrum(8, 12, 2.5)
    assert spectrum.mean().item() == pytest.approx(1)
    assert (spectrum[0, 1] / spectrum[0, 3]).item() == pytest.approx(3**2.5)
    assert (spectrum[1, 0] / spectrum[0, 1]).item() == pytest.approx((8 / 12) ** 2.5)  # longer waves along the width
    assert power_spectrum(8, 8, 2.5)[0, 0] == power_spectrum(8, 8, 2.5)[0, 1]
    torch.testing.assert_close(spectrum[1:, 1:], spectrum[1:, 1:].flip(0, 1))  # of a real field


def test_fields_have_that_covariance() -> None:
    """Drawing is linear, so the images of the unit vectors tell its covariance without a sample."""
    mine = law(4, 6)
    units = torch.eye(24, dtype=torch.float64).view(24, 1, 4, 6).expand(-1, 4, -1, -1)
    images = (torch.stack([mine.draw(unit) for unit in units]) - mine.mean).flatten(2)
    for channel in range(4):
        found = images[:, channel].T @ images[:, channel]
        torch.testing.assert_close(found, covariance(mine.spectrum[channel]), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.07, 0.6, 0.99])
def test_the_ideal_denoiser_is_gaussian_conditioning(alpha: float) -> None:
    mine, level = law(4, 6), level_of(alpha)
    sigma = level.sigma.item()
    xt = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for channel in range(4):
        C, mean = covariance(mine.spectrum[channel]), mine.mean[channel].item()
        kalman = alpha * C @ torch.linalg.inv(alpha**2 * C + sigma**2 * torch.eye(24, dtype=torch.float64))
        expected = mean + kalman @ (xt[0, channel].flatten() - alpha * mean)
        torch.testing.assert_close(mine.denoise(xt, level)[0, channel].flatten(), expected, atol=1e-11, rtol=1e-11)
        errors.append(torch.trace(C - alpha * kalman @ C).item() / 24)
    assert mine.optimum(level).item() == pytest.approx(sum(errors) / 4, rel=1e-10)


def test_normalised_latents_have_the_law_of_normalised_fields() -> None:
    mine, shift, std = (
        law(4, 4),
        torch.tensor([1.0, 0, 2, -1])[:, None, None],
        torch.tensor([2.0, 1, 3, 0.5])[:, None, None],
    )
    white = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(mine.normalised(shift, std).draw(white), (mine.draw(white) - shift) / std)


def samples(noise: Tensor, schedule: Schedule, p: Parameterization, mine: Law, steps: int, method: Method) -> Tensor:
    """The project's sampler with a network that predicts what the ideal denoiser implies."""

    def network(x: Tensor, t: Tensor, context: Tensor, **_: Any) -> tuple[Tensor]:
        level = schedule.at(t)
        x0, alpha, sigma = mine.denoise(x, level), level.alpha[:, None, None, None], level.sigma[:, None, None, None]
        implied = (x - alpha * x0) / sigma
        return (implied if p.prediction_type == "epsilon" else alpha * implied - sigma * x0,)

    told = {"context": torch.zeros(len(noise), 77, 1), "pooled": torch.zeros(len(noise), 1)}
    told["time_ids"] = torch.zeros(len(noise), 6)
    sampling = Sampling(steps=steps, guidance=1.0, rescale=0.0, method=method)
    return sample_latents(network, noise, schedule, p, condition=told, unconditional=told, sampling=sampling)


@pytest.mark.parametrize("method", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.parametrize(
    ("schedule", "p"),
    [(FINITE, V()), (FINITE, Epsilon()), (ZERO, V()), (high_sigma(FINITE, sigma_max=200.0), V()),
     (shifted(FINITE, resolution=512).for_canvas(64, 64), V())],
    ids=["linear v", "linear epsilon", "ztsnr", "high_sigma", "shifted"],
)  # fmt: skip
def test_a_sampling_run_multiplies_each_mode_by_one_number(
    schedule: Schedule, p: Parameterization, method: Method
) -> None:
    """Sample by sample, so that the variances are exact and need no Monte Carlo."""
    mine = law(8, 6)
    noise = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    run = sampled(mine.spectrum, schedule, steps=9, method=method)
    modes = torch.fft.fft2(noise.double() - run.alpha * mine.mean)
    expected = mine.mean + torch.fft.ifft2(run.factors * modes).real
    found = samples(noise, schedule, p, mine, 9, method).double()
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_the_variance_of_many_samples_is_that_of_the_recursion() -> None:
    mine = law(4, 4)
    noise = torch.randn(4000, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    run = sampled(mine.spectrum, FINITE, steps=6)
    found = samples(noise, FINITE, V(), mine, 6, "ddim").double().mean((2, 3))
    assert (found.var(0) / (mine.spectrum[:, 0, 0] / 16)).tolist() == pytest.approx(
        run.variance_kept[:, 0, 0].tolist(), rel=0.1
    )
    assert found.mean(0).tolist() == pytest.approx((run.mean_kept * mine.mean.flatten()).tolist(), abs=0.05)


@pytest.mark.parametrize("schedule", [FINITE, high_sigma(FINITE, sigma_max=200.0)])
def test_many_steps_are_the_flow(schedule: Schedule) -> None:
    spectrum = power_spectrum(16, 16, 2.0)
    end = schedule.at(torch.tensor([999]))
    exact = flow(spectrum, float(end.alpha), float(end.sigma))
    many = sampled(spectrum, schedule, steps=1000, method="dpmpp_2m")
    torch.testing.assert_close(many.variance_kept, exact.variance_kept, atol=0.02, rtol=0.02)
    assert float(many.mean_kept) == pytest.approx(float(exact.mean_kept), abs=0.005)
    assert many.distance(0.5) == pytest.approx(exact.distance(0.5), abs=0.002)


def test_from_zero_snr_the_flow_gives_the_data() -> None:
    exact = flow(power_spectrum(8, 8, 2.0), 0.0, 1.0)
    assert exact.distance(0.5) == pytest.approx(0, abs=1e-12) and float(exact.mean_kept) == 1


@given(st.floats(1.5, 1e4), st.floats(0.01, 20))
def test_what_is_left_of_the_mean_follows_from_its_snr(variance: float, s: float) -> None:
    alpha, sigma = (1 / (1 + s**2)) ** 0.5, s / (1 + s**2) ** 0.5
    run = flow(torch.full((1, 1), variance, dtype=torch.float64), alpha, sigma)
    q = variance / s**2
    assert float(run.mean_kept) == pytest.approx(1 - (q / (1 + q)) ** 0.5, abs=1e-9)
    assert float(run.variance_kept) == pytest.approx(1 / (sigma**2 * (1 + q)))
    assert sigma_max(variance, float(run.variance_kept)) == pytest.approx(s, rel=1e-6)
    assert float(unknown(run.spectrum, alpha, sigma)) / variance == pytest.approx(1 / (1 + q))
    assert float(gain(run.spectrum, 0.0, 1.0)) == 0


def test_the_figures_of_the_first_look() -> None:
    """Fields of 128 x 128 latents, 28 trailing steps: the share of the mean's variance, computed by someone else."""
    spectrum = power_spectrum(128, 128, 2.0)
    ends = [FINITE, high_sigma(FINITE, sigma_max=29.0), high_sigma(FINITE, sigma_max=200.0), ZERO]
    for method, expected in (("ddim", [0.278, 0.557, 0.776, 0.694]), ("dpmpp_2m", [0.284, 0.598, 0.955, 0.783])):
        found = [float(sampled(spectrum, s, steps=28, method=method).variance_kept[0, 0]) for s in ends]  # type: ignore[arg-type]
        assert found == pytest.approx(expected, abs=6e-4)
