"""Noise tables against diffusers' schedulers, closed forms and what is measured on noised samples."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_xl.diffusion.schedule import TableSchedule, cosine, high_sigma, scaled_linear, shifted, ztsnr
from nai_xl.interfaces import Schedule

ALL = torch.arange(1000)
SCHEDULES = {"scaled_linear": scaled_linear(), "ztsnr": ztsnr(scaled_linear())}
by_name = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
COMPOSED = {
    **SCHEDULES,
    "cosine": cosine(),
    "ztsnr(cosine)": ztsnr(cosine()),
    "high_sigma 29": high_sigma(scaled_linear(), sigma_max=29),
    "high_sigma 20000": high_sigma(scaled_linear(), sigma_max=20000),
    "ztsnr(high_sigma)": ztsnr(high_sigma(scaled_linear(), sigma_max=56)),
    "shifted, native": shifted(scaled_linear(), resolution=1024),
    "shifted, large": shifted(scaled_linear(), resolution=1024).for_canvas(2048, 2048),
    "shifted, small": shifted(scaled_linear(), resolution=1024).for_canvas(512, 256),
    "shifted(ztsnr), large": shifted(ztsnr(scaled_linear()), resolution=1024).for_canvas(2048, 1024),
    "ztsnr(shifted), large": ztsnr(shifted(scaled_linear(), resolution=1024)).for_canvas(2048, 1024),
    "ztsnr(shifted(cosine))": ztsnr(shifted(cosine(), resolution=128)).for_canvas(64, 32),
}
by_composition = pytest.mark.parametrize("schedule", COMPOSED.values(), ids=COMPOSED)


def oracle(schedule: Schedule) -> DDPMScheduler:
    """Diffusers' scheduler of SDXL, written out here rather than taken from scheduler_config()."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=schedule.zero_terminal,
    )


@by_name
def test_table_is_that_of_diffusers(schedule: Schedule) -> None:
    abar, level = oracle(schedule).alphas_cumprod, schedule.at(ALL)
    torch.testing.assert_close(level.alpha.square(), abar, atol=1e-6, rtol=0)
    torch.testing.assert_close(level.alpha, abar.sqrt(), atol=1e-6, rtol=0)
    torch.testing.assert_close(level.sigma, (1 - abar).sqrt(), atol=2e-6, rtol=0)


def test_sdxl_noise_runs_from_0_0292_to_14_61() -> None:
    level = SCHEDULES["scaled_linear"].at(torch.tensor([0, 999]))
    assert (level.sigma / level.alpha).tolist() == pytest.approx([0.0292, 14.61], rel=2e-3)


def test_zero_terminal_schedule_ends_at_exactly_zero_and_begins_where_its_base_does() -> None:
    base, rescaled = (SCHEDULES[name].at(ALL) for name in ("scaled_linear", "ztsnr"))
    assert rescaled.alpha[-1] == 0
    assert rescaled.sigma[-1] == 1
    assert rescaled.snr[-1] == 0
    assert rescaled.alpha[0] == base.alpha[0]
    assert [SCHEDULES[name].zero_terminal for name in SCHEDULES] == [False, True]


@by_name
def test_variance_is_preserved_and_snr_falls(schedule: Schedule) -> None:
    level = schedule.at(ALL)
    torch.testing.assert_close(level.alpha.double().square() + level.sigma.double().square(), torch.ones(1000).double())
    assert (level.snr.diff() < 0).all()
    assert level.snr.isfinite().all()


@by_name
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 10, 20, 28, 30, 50, 999, 1000])
def test_inference_timesteps_are_diffusers_trailing_ones(schedule: Schedule, steps: int) -> None:
    ddim = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    ddim.set_timesteps(steps)
    found = schedule.inference_timesteps(steps)
    assert found.tolist() == ddim.timesteps.tolist()


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 1000))
def test_any_number_of_steps_falls_strictly_from_the_last_timestep(steps: int) -> None:
    found = SCHEDULES["ztsnr"].inference_timesteps(steps)
    assert found[0] == 999
    assert len(found) == steps
    assert (found.diff() < 0).all()
    assert found[-1] >= 0


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=r"^steps=.*1000"):
        SCHEDULES["ztsnr"].inference_timesteps(steps)


@by_name
def test_noised_samples_are_those_of_diffusers_at_every_timestep(schedule: Schedule) -> None:
    x0, noise = torch.randn(2, 1000, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    expected = oracle(schedule).add_noise(x0, noise, ALL)
    torch.testing.assert_close(schedule.add_noise(x0, noise, schedule.at(ALL)), expected, atol=1e-5, rtol=0)


@by_name
@pytest.mark.parametrize("t", [0, 1, 100, 500, 900, 998])
def test_signal_to_noise_ratio_measured_on_samples_is_the_tables(schedule: Schedule, t: int) -> None:
    x0, noise = torch.randn(2, 1, 4, 160, 160, generator=torch.Generator().manual_seed(1))
    level = schedule.at(torch.tensor([t]))
    signal = schedule.add_noise(x0, torch.zeros_like(x0), level).var()
    rest = (schedule.add_noise(x0, noise, level) - schedule.add_noise(x0, torch.zeros_like(x0), level)).var()
    assert (signal / rest).item() == pytest.approx(level.snr.item(), rel=0.03)


def test_noise_of_the_first_timestep_survives_half_precision_latents() -> None:
    schedule = SCHEDULES["scaled_linear"]
    x0, noise = torch.full((1, 1, 2, 2), 100.0).bfloat16(), torch.ones(1, 1, 2, 2).bfloat16()
    level = schedule.at(torch.tensor([0]))
    added = schedule.add_noise(x0, noise, level) - 100 * level.alpha
    torch.testing.assert_close(added, torch.full_like(added, 0.02915), atol=1e-4, rtol=0)


@by_name
def test_changing_what_was_returned_changes_no_later_answer(schedule: Schedule) -> None:
    before = schedule.at(ALL)
    spoiled = schedule.at(ALL)
    for tensor in (spoiled.alpha, spoiled.sigma, schedule.inference_timesteps(10)):
        tensor.zero_()
    schedule.scheduler_config()["beta_start"] = 1.0
    after = schedule.at(ALL)
    assert torch.equal(before.alpha, after.alpha)
    assert torch.equal(before.sigma, after.sigma)
    assert schedule.inference_timesteps(10)[0] == 999
    assert schedule.scheduler_config()["beta_start"] == 0.00085


@by_composition
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_scheduler_config_gives_diffusers_the_same_table(schedule: TableSchedule, scheduler: Any) -> None:
    theirs = scheduler(**schedule.scheduler_config())
    assert theirs.config.timestep_spacing == "trailing"
    expected = schedule.abar.clone()
    if scheduler is EulerDiscreteScheduler and schedule.zero_terminal:
        expected[-1] = 2.0**-24  # in place of 0, whose sigma / alpha is infinite
        assert theirs.alphas_cumprod[-1] == 2.0**-24
    torch.testing.assert_close(theirs.alphas_cumprod.double(), expected, atol=1e-6, rtol=0)


@by_composition
def test_exported_euler_scheduler_samples_from_finite_levels(schedule: Schedule) -> None:
    euler = EulerDiscreteScheduler.from_config(EulerDiscreteScheduler(**schedule.scheduler_config()).config)
    euler.set_timesteps(28)
    assert euler.sigmas.isfinite().all()
    assert euler.timesteps.tolist() == schedule.inference_timesteps(28).tolist()


def test_scheduler_config_cannot_be_changed_from_outside() -> None:
    for schedule in COMPOSED.values():
        said = schedule.scheduler_config()
        said.get("trained_betas", [0.0])[0] = 7.0
        assert schedule.scheduler_config().get("trained_betas", [0.0])[0] != 7.0


def test_schedules_that_diffusers_knows_are_exported_by_name() -> None:
    named = {name for name, schedule in COMPOSED.items() if "beta_schedule" in schedule.scheduler_config()}
    assert named == {"scaled_linear", "ztsnr", "cosine", "ztsnr(cosine)", "shifted, native"}


@settings(deadline=None, max_examples=40)
@given(start=st.floats(1e-5, 1e-2), factor=st.floats(1.5, 20), timesteps=st.integers(2, 2000))
def test_rescaling_any_schedule_keeps_its_start_and_its_order(start: float, factor: float, timesteps: int) -> None:
    base = scaled_linear(beta_start=start, beta_end=start * factor, timesteps=timesteps)
    rescaled = ztsnr(base)
    assert isinstance(base, TableSchedule) and isinstance(rescaled, TableSchedule)
    assert rescaled.abar[-1] == 0
    assert rescaled.abar[0].item() == pytest.approx(base.abar[0].item(), rel=1e-12)
    assert (rescaled.abar.diff() < 0).all()
    assert (rescaled.abar <= base.abar + 1e-15).all()
    assert not base.zero_terminal


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.01), (0.02, 0.01), (0.1, 1.0), (-0.1, 0.1)])
def test_betas_out_of_order_are_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match=r"^beta_start="):
        scaled_linear(beta_start=start, beta_end=end)


@pytest.mark.parametrize(
    "table",
    [torch.tensor([0.9, 0.9]).double(), torch.tensor([0.5, 0.6]).double(), torch.tensor([1.0, 0.5]).double(),
     torch.tensor([0.5, -0.1]).double(), torch.tensor([0.9, 0.5])],
    ids=["level", "rising", "starts without noise", "ends below zero", "single precision"],
)  # fmt: skip
def test_table_that_is_no_schedule_is_refused(table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="float64, strictly falling"):
        TableSchedule(table, {})


# --- cosine -----------------------------------------------------------------------------------------------------------


def test_cosine_is_its_closed_form_but_for_the_clipped_last_step() -> None:
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = f[1:] / f[0]
    expected[-1] = expected[-2] * (1 - 0.999)
    found = cosine()
    assert isinstance(found, TableSchedule)
    np.testing.assert_allclose(found.abar, expected, rtol=1e-10, atol=0)
    assert found.abar[-1].item() == pytest.approx(2.43e-9, rel=1e-2)
    assert not found.zero_terminal


@pytest.mark.parametrize("timesteps", [50, 1000])
def test_cosine_is_that_of_diffusers(timesteps: int) -> None:
    theirs = DDPMScheduler(num_train_timesteps=timesteps, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(cosine(timesteps=timesteps).at(torch.arange(timesteps)).alpha.square(), theirs,
                               atol=1e-6, rtol=0)  # fmt: skip


# --- high_sigma -------------------------------------------------------------------------------------------------------


def ratio(schedule: Schedule) -> torch.Tensor:
    """sigma / alpha, [T] float64."""
    assert isinstance(schedule, TableSchedule)
    return (1 / schedule.abar - 1).sqrt()


@pytest.mark.parametrize("sigma_max", [29.0, 56.0, 1000.0, 20000.0])
def test_high_sigma_ends_at_sigma_max_and_keeps_the_low_noise_end(sigma_max: float) -> None:
    base, raised = ratio(scaled_linear()), ratio(high_sigma(scaled_linear(), sigma_max=sigma_max))
    assert raised[-1].item() == pytest.approx(sigma_max, rel=1e-6)
    torch.testing.assert_close(raised[:100], base[:100], rtol=0.01, atol=0)
    torch.testing.assert_close(raised[base <= 1], base[base <= 1], rtol=1e-10, atol=0)
    assert (raised[base > 1] > base[base > 1]).all()
    # smooth: the second difference of ln s jumps nowhere, least of all where the stretch sets in
    bend = raised.log().diff().diff()
    assert bend[100:].diff().abs().max() < 2e-5 * math.log(sigma_max)


def test_high_sigma_at_the_bases_own_end_is_the_base() -> None:
    base = ratio(scaled_linear())
    same = ratio(high_sigma(scaled_linear(), sigma_max=base[-1].item() * (1 + 1e-12)))
    torch.testing.assert_close(same, base, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sigma_max", [14.0, 0.0, -29.0, math.inf, math.nan])
def test_high_sigma_below_its_base_or_without_end_is_refused(sigma_max: float) -> None:
    with pytest.raises(ValueError, match=r"^sigma_max=.*at least 14\.6"):
        high_sigma(scaled_linear(), sigma_max=sigma_max)


@pytest.mark.parametrize("base", [ztsnr(scaled_linear()), scaled_linear(beta_start=1e-4, beta_end=2e-4), cosine()])
def test_high_sigma_refuses_a_base_that_it_cannot_continue(base: Schedule) -> None:
    with pytest.raises(ValueError, match=r"where base ends"):
        high_sigma(base, sigma_max=29)


def test_high_sigma_refuses_a_base_that_depends_on_the_canvas() -> None:
    with pytest.raises(ValueError, match=r"^base: .*inside shifted"):
        high_sigma(shifted(scaled_linear(), resolution=1024))


# --- shifted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("canvas", "k"),
    [((2048, 2048), 2.0), ((512, 512), 0.5), ((1024, 4096), 2.0), ((832, 1216), (832 * 1216) ** 0.5 / 1024)],
)
@pytest.mark.parametrize("base", [scaled_linear(), cosine(), high_sigma(scaled_linear())])
def test_shift_lowers_log_snr_by_twice_the_logarithm_of_k(base: Schedule, canvas: tuple[int, int], k: float) -> None:
    found = shifted(base, resolution=1024).for_canvas(*canvas)
    assert isinstance(base, TableSchedule) and isinstance(found, TableSchedule)
    difference = base.log_snr - found.log_snr
    torch.testing.assert_close(difference, torch.full_like(difference, 2 * math.log(k)), rtol=0, atol=1e-9)
    torch.testing.assert_close(ratio(found), k * ratio(base), rtol=1e-9, atol=0)


def test_twice_the_canvas_length_ends_at_the_papers_29() -> None:
    assert ratio(shifted(scaled_linear(), resolution=1024).for_canvas(2048, 2048))[-1].item() == pytest.approx(
        29.2, rel=1e-2
    )


@pytest.mark.parametrize("canvas", [(1024, 1024), (512, 2048), (2048, 512)])
def test_on_the_native_area_nothing_is_shifted(canvas: tuple[int, int]) -> None:
    base = scaled_linear()
    schedule = shifted(base, resolution=1024)
    assert schedule.for_canvas(*canvas) is base
    for native in (schedule, ztsnr(schedule).for_canvas(*canvas)):
        expected = ztsnr(base) if native.zero_terminal else base
        assert torch.equal(native.at(ALL).alpha, expected.at(ALL).alpha)


def test_rescaling_of_a_shifted_schedule_follows_the_shift_on_every_canvas() -> None:
    composed = ztsnr(shifted(scaled_linear(), resolution=128))
    assert isinstance(composed, TableSchedule)
    for canvas in ((128, 128), (256, 256), (96, 160)):
        k = (canvas[0] * canvas[1]) ** 0.5 / 128
        abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        root = np.sqrt(1 / (1 + k**2 * (1 / abar - 1)))
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        found = composed.for_canvas(*canvas)
        np.testing.assert_allclose(found.abar, root**2, rtol=1e-9, atol=0)
        assert found.zero_terminal
        assert composed.for_canvas(*canvas) is found  # kept
        assert found.for_canvas(7, 7) is found


def test_schedules_of_one_table_are_the_same_on_every_canvas() -> None:
    for schedule in (scaled_linear(), cosine(), ztsnr(scaled_linear()), high_sigma(scaled_linear())):
        assert schedule.for_canvas(8, 4096) is schedule


@pytest.mark.parametrize("resolution", [0, -1024, math.nan])
def test_shift_without_a_resolution_is_refused(resolution: float) -> None:
    with pytest.raises(ValueError, match=r"^resolution="):
        shifted(scaled_linear(), resolution=resolution)


class NoTable:
    """A schedule of somebody else's that is no table."""


@pytest.mark.parametrize("change", [ztsnr, high_sigma, lambda base: shifted(base, resolution=8)])
def test_base_without_a_table_is_refused(change: Any) -> None:
    with pytest.raises(ValueError, match=r"^base: .*NoTable has none"):
        change(NoTable())


# --- between the entries ----------------------------------------------------------------------------------------------


@by_composition
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_float_timesteps_are_the_tables_entries(schedule: Schedule, dtype: torch.dtype) -> None:
    whole, found = schedule.at(ALL), schedule.at(ALL.to(dtype))
    assert torch.equal(found.alpha, whole.alpha)
    assert torch.equal(found.sigma, whole.sigma)
    assert found.t.dtype == dtype and found.alpha.dtype == found.sigma.dtype == torch.float32


@by_composition
def test_levels_between_the_entries_are_finite_continuous_and_fall(schedule: Schedule) -> None:
    t = torch.arange(0, 999 * 16 + 1, dtype=torch.float64) / 16
    level = schedule.at(t)
    alpha, sigma = level.alpha.double(), level.sigma.double()
    assert alpha.isfinite().all() and sigma.isfinite().all()
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(t), atol=3e-7, rtol=0)
    assert (alpha.diff() <= 0).all() and (sigma.diff() >= 0).all()
    assert (level.snr.double().diff() < 0).all()
    # a sixteenth of a step never jumps further than the whole step around it
    whole = schedule.at(ALL).alpha.double().diff().abs().repeat_interleave(16)
    assert (alpha.diff().abs() <= whole * 0.6 + 2e-7).all()


def test_between_two_entries_log_snr_is_straight_and_before_zero_snr_alpha_is() -> None:
    schedule = ztsnr(scaled_linear())
    assert isinstance(schedule, TableSchedule)
    level = schedule.at(torch.tensor([500.25, 998.75], dtype=torch.float64))
    log_snr = 0.75 * schedule.log_snr[500] + 0.25 * schedule.log_snr[501]
    assert level.snr[0].log().item() == pytest.approx(log_snr.item(), abs=1e-5)
    assert level.alpha[1].item() == pytest.approx(0.25 * schedule.abar[998].sqrt().item(), rel=1e-6)


@by_name
def test_float_timesteps_outside_the_table_are_refused(schedule: Schedule) -> None:
    with pytest.raises(IndexError):
        schedule.at(torch.tensor([999.3], dtype=torch.float64))


# --- all of them ------------------------------------------------------------------------------------------------------


@st.composite
def any_schedule(draw: st.DrawFn) -> TableSchedule:
    """A curve with any parameters under any of the changes, on any canvas."""
    timesteps = draw(st.integers(2, 1500))
    start = draw(st.floats(0.02, 1)) / timesteps
    linear = scaled_linear(beta_start=start, beta_end=min(start * draw(st.floats(1.5, 20)), 0.9), timesteps=timesteps)
    schedule = draw(st.sampled_from([linear, cosine(timesteps=timesteps)]))
    end = ratio(schedule)[-1].item()
    if end > 1 and draw(st.booleans()):
        schedule = high_sigma(schedule, sigma_max=end * draw(st.floats(1.001, 1000)))
    if draw(st.booleans()):
        schedule = shifted(schedule, resolution=draw(st.floats(64, 4096)))
    if draw(st.booleans()):
        schedule = ztsnr(schedule)
    found = schedule.for_canvas(draw(st.integers(64, 4096)), draw(st.integers(64, 4096)))
    assert isinstance(found, TableSchedule)
    return found


@settings(deadline=None, max_examples=120)
@given(schedule=any_schedule())
def test_every_schedule_is_finite_preserves_variance_and_loses_signal(schedule: TableSchedule) -> None:
    level = schedule.at(torch.arange(len(schedule)))
    alpha, sigma = level.alpha.double(), level.sigma.double()
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha), atol=3e-7, rtol=0)
    assert level.snr.isfinite().all()
    assert (schedule.log_snr.diff() < 0).all()
    assert schedule.log_snr[:-1].isfinite().all()
    assert (level.sigma > 0).all() and (level.alpha[:-1] > 0).all()
    assert (level.alpha[-1] == 0) == schedule.zero_terminal
    if schedule.abar[0] < 1 - 1e-5:  # diffusers keeps 1 - beta in single precision, in steps of 6e-8
        theirs = DDPMScheduler(**schedule.scheduler_config()).alphas_cumprod
        torch.testing.assert_close(theirs.double(), schedule.abar, atol=5e-6, rtol=0)
