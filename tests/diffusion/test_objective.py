"""The composed loss against NumPy, and what it hands to the network."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nai_xl.diffusion import error, loss, timesteps
from nai_xl.diffusion.objective import Misfit, Objective
from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.schedule import TableSchedule, scaled_linear, ztsnr
from nai_xl.errors import ChoiceError
from nai_xl.interfaces import Batch, NoiseLevel, Parameterization, Schedule, TimestepSampler, Weighting

FINITE, ZERO_TERMINAL = scaled_linear(), ztsnr(scaled_linear())


def batch(u: list[float], weight: list[float] | None = None) -> Batch:
    size = len(u)
    generator = torch.Generator().manual_seed(0)
    return Batch(
        latents=torch.randn(size, 4, 4, 6, generator=generator),
        context=torch.randn(size, 77, 8, generator=generator),
        pooled=torch.randn(size, 5, generator=generator),
        time_ids=torch.rand(size, 6, generator=generator),
        weight=torch.tensor(weight or [1.0] * size),
        position=torch.arange(size),
        item=torch.arange(size),
        u=torch.tensor(u, dtype=torch.float64),
        noise=torch.randn(size, 4, 4, 6, generator=generator),
    )


class FakeUnet:
    """Predicts 0.5 x + t / 1000, and remembers how it was called."""

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, **rest: Any) -> tuple[Tensor]:
        self.x, self.t, self.context, self.rest = x, t, context, rest
        return (0.5 * x + t.view(-1, 1, 1, 1) / 1000,)


def expected_loss(data: Batch, schedule: Schedule, p: Parameterization) -> np.ndarray:
    """Min-SNR-5 loss from the equations, in float64."""
    root = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    if schedule.zero_terminal:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    t = np.floor(data.u.numpy() * 1000).astype(int)
    alpha, sigma = root[t], np.sqrt(1 - root[t] ** 2)
    x0, n = data.latents.double().numpy(), data.noise.double().numpy()
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    xt = a * x0 + s * n
    prediction = 0.5 * xt + t[:, None, None, None] / 1000
    target = {"v_prediction": a * n - s * x0, "epsilon": n, "sample": x0}[p.prediction_type]
    snr = alpha**2 / sigma**2
    c = {"v_prediction": snr + 1, "epsilon": snr, "sample": np.ones_like(snr)}[p.prediction_type]
    per_sample = ((prediction - target) ** 2).mean(axis=(1, 2, 3)) * np.minimum(snr, 5) / c
    return np.asarray(per_sample * data.weight.double().numpy())


@pytest.mark.parametrize(
    ("schedule", "p"),
    [(FINITE, V()), (FINITE, Epsilon()), (FINITE, Sample()), (ZERO_TERMINAL, V()), (ZERO_TERMINAL, Sample())],
)
def test_loss_is_the_equations(schedule: Schedule, p: Parameterization) -> None:
    data = batch([0.0, 0.25, 0.5004, 0.75, 0.9999], weight=[1.0, 2.0, 0.5, 1.0, 3.0])
    losses, level = Objective(schedule, p, timesteps.uniform, loss.min_snr)(FakeUnet(), data)
    assert level.t.tolist() == [0, 250, 500, 750, 999]
    np.testing.assert_allclose(losses, expected_loss(data, schedule, p), rtol=2e-5, atol=1e-9)


def test_sample_weight_multiplies_its_own_loss_only() -> None:
    objective = Objective(ZERO_TERMINAL, V(), timesteps.uniform, loss.uniform)
    plain, _ = objective(FakeUnet(), batch([0.1, 0.5, 0.9]))
    weighed, _ = objective(FakeUnet(), batch([0.1, 0.5, 0.9], weight=[0.0, 1.0, 4.0]))
    torch.testing.assert_close(weighed, plain * torch.tensor([0.0, 1.0, 4.0]))


def test_network_is_called_the_way_diffusers_expects() -> None:
    unet, data = FakeUnet(), batch([0.2, 0.7])
    Objective(FINITE, V(), timesteps.uniform, loss.uniform)(unet, data)
    assert unet.t.tolist() == [200, 700]
    assert unet.context is data.context
    assert unet.rest["added_cond_kwargs"] == {"text_embeds": data.pooled, "time_ids": data.time_ids}
    assert unet.rest["return_dict"] is False
    torch.testing.assert_close(unet.x, FINITE.add_noise(data.latents, data.noise, FINITE.at(unet.t)))


def test_without_micro_conditioning_every_image_is_said_to_be_whole() -> None:
    unet, data = FakeUnet(), batch([0.1, 0.9])
    Objective(FINITE, V(), timesteps.uniform, loss.uniform, micro_conditioning=False)(unet, data)
    told = unet.rest["added_cond_kwargs"]["time_ids"]
    target = data.time_ids[:, 4:]
    assert torch.equal(told, torch.cat([target, torch.zeros(2, 2), target], dim=1))


def test_half_precision_prediction_gives_a_single_precision_loss() -> None:
    def half(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (x.bfloat16(),)

    losses, _ = Objective(FINITE, V(), timesteps.uniform, loss.uniform)(half, batch([0.5]))
    assert losses.dtype == torch.float32


def test_epsilon_on_a_zero_terminal_schedule_is_refused() -> None:
    with pytest.raises(Misfit, match=r"^parameterization=epsilon is undefined on a schedule that ends at zero SNR"):
        Objective(ZERO_TERMINAL, Epsilon(), timesteps.uniform, loss.uniform)
    for schedule, p in ((FINITE, Epsilon()), (ZERO_TERMINAL, V()), (ZERO_TERMINAL, Sample())):
        Objective(schedule, p, timesteps.uniform, loss.uniform)


def test_uniform_timesteps_hit_every_table_entry_equally_often() -> None:
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert torch.equal(timesteps.uniform(u, FINITE).bincount(minlength=1000), torch.full((1000,), 10))
    assert timesteps.uniform(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), FINITE).tolist() == [0, 999]


def test_weight_that_is_infinite_or_negative_somewhere_is_refused() -> None:
    def ratio(level: NoiseLevel, p: Parameterization) -> Tensor:
        return 1 / level.snr

    def negative(level: NoiseLevel, p: Parameterization) -> Tensor:
        return level.alpha - 0.5

    def nothing(level: NoiseLevel, p: Parameterization) -> Tensor:
        return 0 * level.alpha

    with pytest.raises(Misfit, match=r"^weighting: the value at timestep 999 is inf"):
        Objective(ZERO_TERMINAL, V(), timesteps.uniform, ratio)
    Objective(FINITE, V(), timesteps.uniform, ratio)
    with pytest.raises(Misfit, match=r"^weighting: the value at timestep"):
        Objective(FINITE, V(), timesteps.uniform, negative)
    with pytest.raises(Misfit, match=r"^weighting: .*0 at every timestep"):
        Objective(FINITE, V(), timesteps.uniform, nothing)


def test_a_choice_that_refuses_the_schedule_is_named() -> None:
    def never(u: Tensor, schedule: Schedule) -> Tensor:
        raise ValueError("cap=3: must be even")

    with pytest.raises(ChoiceError, match=r"^timesteps\.cap=3: must be even") as told:
        Objective(FINITE, V(), never, loss.uniform)
    assert told.value.choice == "timesteps" and not isinstance(told.value, Misfit)
    with pytest.raises(ChoiceError, match=r"^timesteps\.steps=1001: the schedule has only 1000 timesteps"):
        Objective(FINITE, V(), timesteps.InferenceGrid(1001), loss.uniform)


def test_error_function_takes_the_place_of_the_squared_error() -> None:
    data = batch([0.1, 0.6])
    losses, level = Objective(FINITE, V(), timesteps.uniform, loss.min_snr, error.huber)(FakeUnet(), data)
    xt = FINITE.add_noise(data.latents, data.noise, level)
    prediction, target = FakeUnet()(xt, level.t, data.context)[0], V().target(data.latents, data.noise, level)
    expected = error.huber(prediction, target, level) * loss.min_snr(level, V())
    torch.testing.assert_close(losses, expected)


def by_tenths(u: Tensor, schedule: Schedule) -> Tensor:
    """Dense at high noise: t/T = sqrt(u)."""
    return (u.sqrt() * len(schedule)).long().clamp(max=len(schedule) - 1)


@pytest.mark.parametrize("weighting", [loss.min_snr, loss.debiased, loss.p2, loss.edm])
@pytest.mark.parametrize("sampler", [timesteps.uniform, by_tenths])
@pytest.mark.parametrize("p", [V(), Sample()])
def test_normalised_weights_have_expectation_one(weighting: Weighting, sampler: TimestepSampler, p: Any) -> None:
    """By Monte Carlo over u: the ratio of losses with and without is constant, and the mean weight becomes 1."""
    plain = Objective(FINITE, p, sampler, weighting)
    normal = Objective(FINITE, p, sampler, weighting, normalize_weights=True)
    u = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = weighting(FINITE.at(sampler(u, FINITE)), p).double()
    tolerance = 5 * (drawn.std() / drawn.mean()).item() / 200_000**0.5 + 1e-6
    assert abs(drawn.mean().item() / normal.expected_weight(32, 48) - 1) < tolerance
    data = batch([0.1, 0.5, 0.9])
    ratio = plain(FakeUnet(), data)[0] / normal(FakeUnet(), data)[0]
    torch.testing.assert_close(ratio, torch.full((3,), normal.expected_weight(32, 48)))


def test_normalising_the_uniform_schedule_is_the_mean_over_the_table_exactly() -> None:
    normal = Objective(ZERO_TERMINAL, V(), timesteps.uniform, loss.min_snr, normalize_weights=True)
    table = loss.min_snr(ZERO_TERMINAL.at(torch.arange(1000)), V()).double().mean()
    assert normal.expected_weight(64, 64) == pytest.approx(table.item(), rel=1e-12)


def test_normalised_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    normal = Objective(ZERO_TERMINAL, V(), timesteps.uniform, loss.min_snr, normalize_weights=True)
    together = batch([0.1, 0.5, 0.9])
    alone = Batch(**{name: getattr(together, name)[:1] for name in Batch.__dataclass_fields__})
    torch.testing.assert_close(normal(FakeUnet(), alone)[0], normal(FakeUnet(), together)[0][:1])


def test_each_canvas_is_trained_and_normalised_on_its_own_schedule() -> None:
    @dataclass(frozen=True, eq=False)
    class ByCanvas(TableSchedule):
        def for_canvas(self, height: int, width: int) -> Schedule:
            return ZERO_TERMINAL if (height, width) == (32, 48) else FINITE

    schedule = ByCanvas(scaled_linear().at(torch.arange(1000)).alpha.double().square(), {})
    objective = Objective(schedule, V(), timesteps.uniform, loss.min_snr, normalize_weights=True)
    _, level = objective(FakeUnet(), batch([0.9999]))
    assert level.alpha.item() == 0
    on_zero, on_finite = (
        Objective(s, V(), timesteps.uniform, loss.min_snr).expected_weight(32, 48) for s in (ZERO_TERMINAL, FINITE)
    )
    assert objective.expected_weight(32, 48) == on_zero != on_finite == objective.expected_weight(64, 64)


def test_input_perturbation_enters_the_input_and_not_the_target() -> None:
    plain, perturbed = batch([0.3, 0.8]), batch([0.3, 0.8])
    perturbed.perturbation = 0.1 * torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(5))
    unet, seen = FakeUnet(), []
    level = FINITE.at(torch.tensor([300, 800]))
    for data in (plain, perturbed):
        Objective(FINITE, V(), timesteps.uniform, loss.uniform)(unet, data)
        seen.append(unet.x)
    torch.testing.assert_close(seen[1] - seen[0], level.sigma.view(-1, 1, 1, 1) * perturbed.perturbation)

    def perfect(*_: Any, **__: Any) -> tuple[Tensor]:
        return (V().target(plain.latents, plain.noise, level),)

    losses, _ = Objective(FINITE, V(), timesteps.uniform, loss.uniform)(perfect, perturbed)
    assert torch.equal(losses, torch.zeros(2))
