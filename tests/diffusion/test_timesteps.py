"""Timestep samplers against closed forms of their densities."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.diffusion.timesteps import HighNoise, InferenceGrid, LogitNormal, Stratified, density, strata_of, uniform
from nai_xl.interfaces import Schedule, TimestepSampler

SCHEDULE = ztsnr(scaled_linear())
SAMPLERS: dict[str, TimestepSampler] = {
    "uniform": uniform,
    "stratified": Stratified(),
    "logit_normal": LogitNormal(),
    "logit_normal, noisy": LogitNormal(mean=3.0, std=4.0),
    "high_noise": HighNoise(),
    "inference_grid": InferenceGrid(),
}
EDGES = np.arange(1001) / 1000


def phi(x: np.ndarray) -> np.ndarray:
    """The standard normal distribution function."""
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_stays_in_the_table_rises_and_has_a_density(sampler: TimestepSampler) -> None:
    ends = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    t = sampler(ends, SCHEDULE)
    assert t.dtype == torch.int64
    assert (t >= 0).all() and (t <= 999).all()
    assert (sampler(torch.linspace(0, 1 - 1e-9, 5000, dtype=torch.float64), SCHEDULE).diff() >= 0).all()
    found = density(sampler, SCHEDULE)
    assert found.shape == (1000,) and found.dtype == torch.float64
    assert found.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sampler", [uniform, Stratified(), Stratified(strata=7), HighNoise(emphasis=0)])
def test_uniform_takes_every_timestep_equally_often(sampler: TimestepSampler) -> None:
    torch.testing.assert_close(
        density(sampler, SCHEDULE), torch.full((1000,), 1e-3, dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5), (-0.5, 2.0)])
def test_logit_normal_has_the_published_density(mean: float, std: float) -> None:
    found = density(LogitNormal(mean, std), SCHEDULE).numpy()
    with np.errstate(divide="ignore"):
        exact = np.diff(phi((np.log(EDGES) - np.log1p(-EDGES) - mean) / std))
    np.testing.assert_allclose(found, exact, atol=5.1e-6 * 2)
    x = (EDGES[1:] + EDGES[:-1]) / 2  # equation 19 itself, at the middle of each timestep
    published = np.exp(-((np.log(x / (1 - x)) - mean) ** 2) / (2 * std**2)) / (
        std * math.sqrt(2 * math.pi) * x * (1 - x)
    )
    inner = slice(50, 950)
    np.testing.assert_allclose(found[inner] * 1000, published[inner], rtol=0.01, atol=0.01)


def test_a_larger_mean_is_noisier() -> None:
    t = torch.arange(1000).double()
    means = [(density(LogitNormal(mean), SCHEDULE) * t).sum().item() for mean in (-1.0, 0.0, 1.0)]
    assert means[0] < means[1] < means[2]
    assert means[1] == pytest.approx(499.5, abs=0.01)


@pytest.mark.parametrize("emphasis", [0.0, 0.5, 1.0, 4.0])
def test_high_noise_is_its_power_of_the_place_in_the_table(emphasis: float) -> None:
    exact = np.diff(EDGES ** (1 + emphasis))
    np.testing.assert_allclose(density(HighNoise(emphasis), SCHEDULE), exact, atol=5.1e-6 * 2)


@pytest.mark.parametrize("steps", [1, 4, 28, 30, 1000])
def test_inference_grid_is_what_a_trailing_sampler_visits_equally_often(steps: int) -> None:
    found = density(InferenceGrid(steps), SCHEDULE)
    assert found.nonzero().flatten().tolist() == SCHEDULE.inference_timesteps(steps).flip(0).tolist()
    np.testing.assert_allclose(found[found > 0], 1 / steps, atol=5.1e-6)


def test_inference_grid_asks_for_no_more_steps_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"^steps=1001: the schedule has only 1000"):
        InferenceGrid(1001)(torch.zeros(1, dtype=torch.float64), SCHEDULE)


@pytest.mark.parametrize(
    ("sampler", "values"),
    [
        (Stratified, {"strata": 0}),
        (LogitNormal, {"std": 0.0}),
        (LogitNormal, {"std": math.nan}),
        (HighNoise, {"emphasis": -0.1}),
        (InferenceGrid, {"steps": 0}),
    ],
)
def test_meaningless_parameters_are_refused_when_built(sampler: Any, values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(values))}="):
        sampler(**values)


def test_only_a_sampler_that_says_so_has_its_draws_stratified() -> None:
    class InPairs:
        """Somebody else's sampler."""

        def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
            return uniform(u, schedule)

        def strata_for(self, images_per_step: int) -> int | None:
            return 2 if images_per_step % 2 == 0 else None

    assert strata_of(Stratified(), 12) == 12 and strata_of(Stratified(strata=7), 12) == 7
    assert strata_of(InPairs(), 12) == 2 and strata_of(InPairs(), 3) is None
    for sampler in (uniform, functools.partial(uniform), LogitNormal(), HighNoise(), InferenceGrid()):
        assert strata_of(sampler, 12) is None


@settings(deadline=None, max_examples=60)
@given(
    u=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20),
    mean=st.floats(-10, 10),
    std=st.floats(0.01, 10),
    emphasis=st.floats(0, 50),
    timesteps=st.integers(2, 1500),
)
def test_no_parameter_leads_out_of_the_table(
    u: list[float], mean: float, std: float, emphasis: float, timesteps: int
) -> None:
    schedule = scaled_linear(timesteps=timesteps)
    for sampler in (uniform, LogitNormal(mean, std), HighNoise(emphasis), InferenceGrid(min(28, timesteps))):
        level = schedule.at(sampler(torch.tensor(u, dtype=torch.float64), schedule))
        assert level.alpha.isfinite().all()
