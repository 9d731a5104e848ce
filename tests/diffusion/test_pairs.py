"""Every combination of the options that lie in conf: it gives finite numbers, or it is refused with a reason."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from nai_xl import config
from nai_xl.diffusion.objective import Misfit, Objective
from nai_xl.diffusion.timesteps import density
from nai_xl.errors import UserError
from nai_xl.interfaces import Batch
from nai_xl.task.objective import compose_objective


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (config.conf_dir() / group).glob("*.yaml"))


@functools.cache
def option(group: str, name: str) -> Any:
    return config.build(config.compose([f"{group}={name}"])[group])


def half(x: Tensor, t: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    """A network that keeps half of what it is shown."""
    return (0.5 * x,)


def batch(canvas: int, size: int = 24) -> Batch:
    """Timestep draws over the whole range, on a square canvas of that many pixels."""
    latents, noise = torch.randn(2, size, 4, canvas // 8, canvas // 8, generator=torch.Generator().manual_seed(0))
    u = torch.linspace(0, 1 - 2.0**-53, size, dtype=torch.float64)
    place = torch.arange(size)
    return Batch(
        latents, torch.zeros(size, 77, 8), torch.zeros(size, 5), torch.zeros(size, 6), torch.ones(size), place, place,
        u, noise,
    )  # fmt: skip


NATIVE = 128  # of the default model
FIELDS = ("schedule", "parameterization", "timesteps", "weighting")
BATCHES = [batch(NATIVE), batch(2 * NATIVE)]


@pytest.mark.parametrize("loss", options("loss"))
@pytest.mark.parametrize("parameterization", options("parameterization"))
@pytest.mark.parametrize("schedule", options("schedule"))
def test_combination_is_finite_or_refused_with_a_reason(schedule: str, parameterization: str, loss: str) -> None:
    for timesteps in options("timesteps"):
        groups = {"schedule": schedule, "parameterization": parameterization, "timesteps": timesteps, "loss": loss}
        parts = [option(*choice) for choice in groups.items()]
        try:
            objective = compose_objective(Objective, NATIVE, **dict(zip(FIELDS, parts, strict=True)))
        except UserError as reason:
            assert any(f"{group}=" in str(reason) for group in groups), reason
            continue
        for data in BATCHES:
            losses, level = objective(half, data)
            assert losses.isfinite().all() and (losses >= 0).all(), timesteps
            assert level.alpha.isfinite().all() and level.sigma.isfinite().all()


@pytest.mark.parametrize("loss", options("loss"))
@pytest.mark.parametrize("parameterization", options("parameterization"))
@pytest.mark.parametrize("schedule", options("schedule"))
def test_weights_are_finite_at_every_timestep(schedule: str, parameterization: str, loss: str) -> None:
    table, p, weighting = (
        option("schedule", schedule), option("parameterization", parameterization), option("loss", loss)
    )  # fmt: skip
    try:
        Objective(table, p, option("timesteps", "uniform"), weighting)
    except Misfit:
        return
    for canvas in (NATIVE, 2 * NATIVE):
        level = table.for_canvas(canvas, canvas).at(torch.arange(len(table)))
        weights = weighting(level, p)
        assert weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any()


@pytest.mark.parametrize("schedule", options("schedule"))
@pytest.mark.parametrize("timesteps", options("timesteps"))
def test_every_sampler_goes_with_every_schedule(timesteps: str, schedule: str) -> None:
    table = option("schedule", schedule)
    for canvas in (NATIVE, 2 * NATIVE):
        found = density(option("timesteps", timesteps), table.for_canvas(canvas, canvas), per_timestep=3)
        assert len(found) == len(table) and found.sum().item() == pytest.approx(1)


def test_epsilon_is_refused_on_the_zero_terminal_schedule_alone() -> None:
    refused = set()
    for schedule in options("schedule"):
        for parameterization in options("parameterization"):
            parts = option("schedule", schedule), option("parameterization", parameterization)
            try:
                Objective(*parts, option("timesteps", "uniform"), option("loss", "uniform"))
            except Misfit:
                refused.add((schedule, parameterization))
    assert refused == {("ztsnr", "epsilon")}


@pytest.mark.parametrize("over", ["ztsnr", "high_sigma", "shifted"])
@pytest.mark.parametrize("base", options("schedule"))
def test_any_base_can_be_put_under_a_change_on_the_command_line(over: str, base: str) -> None:
    overrides = [f"schedule={over}", f"schedule@schedule.base={base}"]
    if base == "high_sigma":
        overrides.append("schedule.base.sigma_max=25")
    cfg = config.compose(overrides)
    config.check(cfg)
    assert str(cfg.schedule.base._target_).endswith(base)
    try:
        schedule = config.build(cfg.schedule)
    except UserError as reason:
        assert over == "high_sigma" and base in ("ztsnr", "shifted", "cosine")
        assert "sigma_max=" in str(reason) or "base: " in str(reason)
        return
    assert schedule.at(torch.arange(len(schedule))).alpha.isfinite().all()


def test_a_base_that_is_no_schedule_is_told() -> None:
    with pytest.raises(UserError, match=r"schedule\.base=5"):
        config.check(config.compose(["schedule.base=5"]))
