"""The samplers against diffusers' schedulers fed by the same network, and against an ODE solved in closed form."""

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.sampling import (
    SOLVERS,
    Estimate,
    Method,
    Sampling,
    ddim,
    dpmpp_2m,
    euler,
    rescale_guidance,
    sample_latents,
)
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.interfaces import NoiseLevel, Parameterization, Schedule

METHODS: tuple[Method, ...] = get_args(Method)
FINITE, ZERO_TERMINAL = scaled_linear(), ztsnr(scaled_linear())
NOISE = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(0))


def condition(value: float, size: int = 2) -> dict[str, Tensor]:
    names = {"context": (size, 77, 3), "pooled": (size, 5), "time_ids": (size, 6)}
    return {name: torch.full(shape, value) for name, shape in names.items()}


def network(x: Tensor, t: Tensor) -> Tensor:
    """A fixed linear function of x whose coefficients depend on t."""
    share = t.view(-1, 1, 1, 1) / 1000
    return (0.9 - 0.5 * share) * x + 0.3 * share * x.flip(2) + 0.1 * share


def fake_unet(x: Tensor, t: Tensor, context: Tensor, **_: Any) -> tuple[Tensor]:
    return (network(x, t),)


def sample(unet: Any, schedule: Schedule, p: Parameterization, sampling: Sampling) -> Tensor:
    return sample_latents(
        unet, NOISE, schedule, p, condition=condition(1.0), unconditional=condition(0.0), sampling=sampling
    )


def oracle_settings(schedule: Schedule, p: Parameterization) -> dict[str, Any]:
    return {**schedule.scheduler_config(), "prediction_type": p.prediction_type}


def plain(steps: int, method: Method = "ddim") -> Sampling:
    return Sampling(steps=steps, guidance=1.0, rescale=0.0, method=method)


# diffusers steps back by 1000 // steps, which is the next timestep only where steps divides 1000
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 25, 50])
@pytest.mark.parametrize(
    ("schedule", "p"),
    [(FINITE, V()), (FINITE, Epsilon()), (FINITE, Sample()), (ZERO_TERMINAL, V()), (ZERO_TERMINAL, Sample())],
)
def test_samples_are_those_of_diffusers_ddim(schedule: Schedule, p: Parameterization, steps: int) -> None:
    oracle = DDIMScheduler(**oracle_settings(schedule, p), clip_sample=False, set_alpha_to_one=True)
    oracle.set_timesteps(steps)
    x = NOISE.clone()
    for t in oracle.timesteps:
        x = oracle.step(network(x, t.expand(len(x))), t, x, eta=0.0).prev_sample
    found = sample(fake_unet, schedule, p, plain(steps))
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


# diffusers begins a zero-terminal schedule at sigma / alpha = 4096, where alpha = 2.4e-4
@pytest.mark.parametrize(
    ("schedule", "p", "tolerance"),
    [
        (FINITE, V(), 1e-4),
        (FINITE, Epsilon(), 1e-4),
        (FINITE, Sample(), 1e-4),
        (ZERO_TERMINAL, V(), 1e-3),
        (ZERO_TERMINAL, Sample(), 1e-3),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
def test_samples_are_those_of_diffusers_euler(
    schedule: Schedule, p: Parameterization, tolerance: float, steps: int
) -> None:
    oracle = EulerDiscreteScheduler(**oracle_settings(schedule, p))
    oracle.set_timesteps(steps)
    x = NOISE * (oracle.sigmas[0] ** 2 + 1).sqrt()
    for t in oracle.timesteps:
        x = oracle.step(network(oracle.scale_model_input(x, t), t.expand(len(x))), t, x).prev_sample
    found = sample(fake_unet, schedule, p, plain(steps, "euler"))
    torch.testing.assert_close(found, x, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("p", [V(), Epsilon(), Sample()])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 14, 28, 50])
def test_samples_are_those_of_diffusers_dpm_solver(p: Parameterization, steps: int) -> None:
    oracle = DPMSolverMultistepScheduler(
        **oracle_settings(FINITE, p),
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    oracle.set_timesteps(steps)
    x = NOISE.clone()
    for t in oracle.timesteps:
        x = oracle.step(network(x, t.expand(len(x))), t, x).prev_sample
    found = sample(fake_unet, FINITE, p, plain(steps, "dpmpp_2m"))
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


# --- Gaussian data: the network is known, and the ODE is solved by keeping (x - alpha mu) / std_t ---------------------

MEAN, STD = 0.7, 0.4


def spread(level: NoiseLevel) -> Tensor:
    return (level.alpha.square() * STD**2 + level.sigma.square()).sqrt()


def posterior_mean(x: Tensor, level: NoiseLevel) -> Tensor:
    """E[x0 | x_t] where every pixel of the data is N(MEAN, STD^2)."""
    return MEAN + level.alpha * STD**2 / spread(level).square() * (x - level.alpha * MEAN)


def exact(x: Tensor, start: NoiseLevel, end: NoiseLevel) -> Tensor:
    return end.alpha * MEAN + spread(end) / spread(start) * (x - start.alpha * MEAN)


def gaussian_unet(schedule: Schedule) -> Any:
    def unet(x: Tensor, t: Tensor, context: Tensor, **_: Any) -> tuple[Tensor]:
        at = schedule.at(t)
        level = NoiseLevel(t, at.alpha.view(-1, 1, 1, 1), at.sigma.view(-1, 1, 1, 1))
        x0 = posterior_mean(x, level)
        return (V().target(x0, (x - level.alpha * x0) / level.sigma, at),)

    return unet


def at_log_ratio(value: Tensor) -> NoiseLevel:
    return NoiseLevel(value, torch.sigmoid(2 * value).sqrt(), torch.sigmoid(-2 * value).sqrt())


def error_of_walk(method: Method, steps: int) -> float:
    """From log(alpha / sigma) = -1 to 1.5 in float64, against the exact solution."""
    levels = [at_log_ratio(value) for value in torch.linspace(-1, 1.5, steps + 1, dtype=torch.float64)]
    start, before = NOISE.double(), None
    x = start
    for level, following in pairwise(levels):
        now = Estimate(posterior_mean(x, level), level)
        x, before = SOLVERS[method](x, now, following, before), now
    return (x - exact(start, levels[0], levels[-1])).abs().max().item()


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2)])
def test_error_falls_with_the_solvers_order(method: Method, order: int) -> None:
    coarse, fine = error_of_walk(method, 320), error_of_walk(method, 640)
    assert coarse / fine == pytest.approx(2**order, rel=0.03)


@pytest.mark.parametrize("schedule", [FINITE, ZERO_TERMINAL])
@pytest.mark.parametrize("method", METHODS)
def test_samples_tend_to_the_exact_solution(schedule: Schedule, method: Method) -> None:
    last = schedule.at(torch.tensor(len(schedule) - 1))
    expected = exact(NOISE, last, NoiseLevel(torch.tensor(0), torch.tensor(1.0), torch.tensor(0.0)))
    errors = []
    for steps in (10, 40, 160):
        found = sample(gaussian_unet(schedule), schedule, V(), plain(steps, method))
        errors.append((found - expected).abs().max().item())
    assert all(fine < 0.6 * coarse for coarse, fine in pairwise(errors)), errors
    torch.testing.assert_close(found.mean(), expected.mean(), atol=0.02, rtol=0)
    torch.testing.assert_close(found.std(), expected.std(), atol=0.02, rtol=0)


def test_second_order_pays_at_28_steps() -> None:
    """A third less error: what is left comes from the steps at both ends, which are of first order for every solver."""
    expected = MEAN + STD * NOISE  # from pure noise
    errors = {}
    for method in METHODS:
        found = sample(gaussian_unet(ZERO_TERMINAL), ZERO_TERMINAL, V(), plain(28, method))
        errors[method] = (found - expected).square().mean().sqrt().item()
    assert errors["dpmpp_2m"] < 0.75 * errors["ddim"]


log_ratios = st.floats(-4, 4)
values = st.floats(-5, 5).map(lambda v: torch.tensor(v, dtype=torch.float64))
INFINITE = NoiseLevel(*torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@given(x=values, x0=values, start=st.one_of(st.none(), log_ratios), end=log_ratios)
def test_one_step_is_the_same_for_every_solver(x: Tensor, x0: Tensor, start: float | None, end: float) -> None:
    """Without a step before, all three are DDIM, from pure noise too."""
    level = INFINITE if start is None else at_log_ratio(torch.tensor(start, dtype=torch.float64))
    now, to = Estimate(x0, level), at_log_ratio(torch.tensor(end, dtype=torch.float64))
    expected = ddim(x, now, to)
    for solver in (euler, dpmpp_2m):
        torch.testing.assert_close(solver(x, now, to), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_from_pure_noise_is_exact(method: Method) -> None:
    """x_1 / alpha_1 = s_1 n - F(n): NovelAI V3, 2409.15997, appendix."""
    prediction = network(NOISE, torch.full((2,), 999))
    level = ZERO_TERMINAL.at(torch.tensor(900))
    last = ZERO_TERMINAL.at(torch.tensor(999))
    x0 = V().to_x0(NOISE, prediction, ZERO_TERMINAL.at(torch.full((2,), 999)))
    found = SOLVERS[method](NOISE, Estimate(x0, last), level, None)
    torch.testing.assert_close(found / level.alpha, level.sigma / level.alpha * NOISE - prediction)


@pytest.mark.parametrize("method", METHODS)
def test_one_step_from_pure_noise_is_minus_v(method: Method) -> None:
    found = sample(fake_unet, ZERO_TERMINAL, V(), plain(1, method))
    torch.testing.assert_close(found, -network(NOISE, torch.full((2,), 999)))


def test_the_step_after_pure_noise_is_of_first_order() -> None:
    level, to = ZERO_TERMINAL.at(torch.tensor(900)), ZERO_TERMINAL.at(torch.tensor(800))
    before = Estimate(5 * NOISE, ZERO_TERMINAL.at(torch.tensor(999)))
    now = Estimate(2 * NOISE, level)
    assert torch.equal(dpmpp_2m(NOISE, now, to, before), dpmpp_2m(NOISE, now, to))
    later = Estimate(5 * NOISE, ZERO_TERMINAL.at(torch.tensor(950)))
    assert not torch.equal(dpmpp_2m(NOISE, now, to, later), dpmpp_2m(NOISE, now, to))


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [FINITE, ZERO_TERMINAL])
@pytest.mark.parametrize("steps", [1, 3, 28])
@pytest.mark.parametrize("method", METHODS)
def test_network_that_knows_the_image_leads_to_it_from_any_noise(
    schedule: Schedule, steps: int, method: Method
) -> None:
    image = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(1))

    def oracle(x: Tensor, t: Tensor, context: Tensor, **_: Any) -> tuple[Tensor]:
        level = schedule.at(t)
        alpha, sigma = level.alpha.view(-1, 1, 1, 1), level.sigma.view(-1, 1, 1, 1)
        target = torch.cat([image, image])
        return (V().target(target, (x - alpha * target) / sigma, level),)

    found = sample(oracle, schedule, V(), plain(steps, method))
    torch.testing.assert_close(found, image, atol=1e-4, rtol=1e-4)


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    def by_context(x: Tensor, t: Tensor, context: Tensor, **rest: Any) -> tuple[Tensor]:
        added = rest["added_cond_kwargs"]
        assert rest["return_dict"] is False
        assert torch.equal(added["text_embeds"][:, 0], context[:, 0, 0])
        assert torch.equal(added["time_ids"][:, 0], context[:, 0, 0])
        return ((2 + 3 * context[:, :1, :1, None]) * x,)

    found = sample(by_context, ZERO_TERMINAL, V(), Sampling(steps=1, guidance=4.0, rescale=0.0))
    torch.testing.assert_close(found, -(2 + 4 * 3) * NOISE)  # at zero SNR x0 = -v


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_guidance_rescale_brings_the_spread_back_by_its_share(phi: float) -> None:
    generator = torch.Generator().manual_seed(2)
    conditional = torch.randn(3, 4, 5, 6, generator=generator) * torch.tensor([0.5, 1.0, 2.0]).view(-1, 1, 1, 1)
    guided = 7 * conditional + torch.randn(3, 4, 5, 6, generator=generator)
    found = rescale_guidance(guided, conditional, phi)
    spread = phi * conditional.flatten(1).std(1) + (1 - phi) * guided.flatten(1).std(1)
    torch.testing.assert_close(found.flatten(1).std(1), spread)
    torch.testing.assert_close(found / guided, (found / guided)[:, :1, :1, :1].expand_as(found))


def test_rescale_zero_changes_nothing() -> None:
    found = rescale_guidance(5 * NOISE, NOISE, 0.0)
    assert torch.equal(found, 5 * NOISE)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rescale": -0.1}, {"rescale": 1.1}, {"method": "heun"}])
def test_impossible_sampling_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))}="):
        Sampling(**wrong)
