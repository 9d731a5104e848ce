"""Weightings against their definition on the x0 error, in float64."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nai_xl import config
from nai_xl.diffusion import loss, timesteps
from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.errors import ChoiceError
from nai_xl.interfaces import Parameterization, Schedule, Weighting

ALL = torch.arange(1000)
FINITE, ZERO_TERMINAL = scaled_linear(), ztsnr(scaled_linear())
# |x0 error|^2 = |prediction error|^2 / c
C: dict[Parameterization, Callable[[np.ndarray], np.ndarray]] = {
    V(): lambda snr: snr + 1,
    Epsilon(): lambda snr: snr,
    Sample(): np.ones_like,
}
ON_X0: dict[Weighting, Callable[[np.ndarray], np.ndarray]] = {
    loss.min_snr: lambda snr: np.minimum(snr, 5),
    functools.partial(loss.min_snr, gamma=1.5): lambda snr: np.minimum(snr, 1.5),
    loss.min_snr_plus_one: lambda snr: np.minimum(snr + 1, 5),
    functools.partial(loss.min_snr_plus_one, gamma=20.0): lambda snr: np.minimum(snr + 1, 20),
    loss.soft_min_snr: lambda snr: 1 / (1 / np.maximum(snr, 1e-300) + 1 / 4),
    functools.partial(loss.soft_min_snr, gamma=1.0): lambda snr: snr / (snr + 1),
    loss.debiased: np.sqrt,
    loss.p2: lambda snr: snr / (1 + snr),
    functools.partial(loss.p2, k=0.5, gamma=0.5): lambda snr: snr / np.sqrt(0.5 + snr),
    loss.edm: lambda snr: snr + 1,
    functools.partial(loss.edm, sigma_data=0.5): lambda snr: snr + 4,
}
PAIRS = [(s, p) for s in (FINITE, ZERO_TERMINAL) for p in C if p.defined_at_zero_snr or not s.zero_terminal]
allowed = pytest.mark.parametrize(
    ("schedule", "p"),
    PAIRS,
    ids=[f"{p.prediction_type}-{'zero_terminal' if s.zero_terminal else 'finite'}" for s, p in PAIRS],
)


def snr64(schedule: Schedule) -> np.ndarray:
    """SNR from SDXL's betas by NumPy."""
    root = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    if schedule.zero_terminal:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return np.asarray(root**2 / (1 - root**2))


@allowed
def test_weight_on_the_prediction_error_is_the_weight_on_the_x0_error(schedule: Schedule, p: Parameterization) -> None:
    snr = snr64(schedule)
    for weighting, on_x0 in ON_X0.items():
        expected = on_x0(snr) / C[p](snr)
        np.testing.assert_allclose(weighting(schedule.at(ALL), p).double(), expected, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("weighting", list(ON_X0))
def test_same_image_error_costs_the_same_whatever_is_predicted(weighting: Weighting) -> None:
    """From two denoised images, back through each parameterization's own to_x0 by solving for the prediction."""
    level = FINITE.at(ALL)
    generator = torch.Generator().manual_seed(0)
    x0, noise, error = torch.randn(3, 1000, 1, 1, 1, dtype=torch.float64, generator=generator)
    costs = []
    for p in C:
        target = p.target(x0, noise, level)
        xt = level.alpha.double().view(-1, 1, 1, 1) * x0 + level.sigma.double().view(-1, 1, 1, 1) * noise
        slope = p.to_x0(xt, target + 1, level) - p.to_x0(xt, target, level)  # to_x0 is affine in the prediction
        prediction = target + error / slope
        torch.testing.assert_close(p.to_x0(xt, prediction, level) - p.to_x0(xt, target, level), error)
        costs.append(weighting(level, p) * (prediction - target).square().flatten())
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-4, atol=0)


def test_uniform_weight_is_one_on_the_prediction_error() -> None:
    for schedule, p in PAIRS:
        assert torch.equal(loss.uniform(schedule.at(ALL), p), torch.ones(1000))


def s64(schedule: Schedule) -> np.ndarray:
    """EDM's noise level sigma/alpha of a finite schedule."""
    return np.asarray(snr64(schedule) ** -0.5)


PUBLISHED: list[tuple[Weighting, Parameterization, Callable[[np.ndarray], np.ndarray]]] = [
    # k-diffusion's soft-min-snr and v weight with sigma_data = 1, on the error of its preconditioned network
    (functools.partial(loss.soft_min_snr, gamma=1.0), V(), lambda s: s**2 / (s**2 + 1) ** 2),
    (loss.debiased, Epsilon(), lambda s: s),
    (loss.p2, Epsilon(), lambda s: 1 / (1 + s**-2)),
    (functools.partial(loss.p2, gamma=0.5), Epsilon(), lambda s: (1 + s**-2) ** -0.5),
    (loss.edm, V(), np.ones_like),
    # EDM's own network output error has the weight lambda c_out^2 = 1 for any sigma_data; on x0 it is lambda
    (functools.partial(loss.edm, sigma_data=0.5), Sample(), lambda s: (s**2 + 0.25) / (s * 0.5) ** 2),
]


@pytest.mark.parametrize("number", range(len(PUBLISHED)))
def test_weight_is_the_published_one_in_the_paper_s_own_terms(number: int) -> None:
    weighting, p, published = PUBLISHED[number]
    np.testing.assert_allclose(weighting(FINITE.at(ALL), p).double(), published(s64(FINITE)), rtol=2e-5)


def test_edm_with_unit_data_is_the_uniform_weight_for_v_at_zero_terminal_snr_too() -> None:
    torch.testing.assert_close(loss.edm(ZERO_TERMINAL.at(ALL), V()), torch.ones(1000))


def test_soft_min_snr_stays_below_min_snr_and_meets_it_at_both_ends() -> None:
    for p in C:
        soft, hard = (w(FINITE.at(ALL), p, gamma=5.0) for w in (loss.soft_min_snr, loss.min_snr))
        assert (soft <= hard * (1 + 1e-6)).all()
        torch.testing.assert_close(soft[[0, 999]], hard[[0, 999]], rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("option", "wrong"),
    [("minsnr", {"gamma": 0.0}), ("minsnr_plus_one", {"gamma": -1.0}), ("soft_minsnr", {"gamma": float("inf")}),
     ("p2", {"k": 0.0}), ("p2", {"gamma": -1.0}), ("edm", {"sigma_data": 0.0})],
)  # fmt: skip
def test_constant_without_meaning_is_refused_by_name(option: str, wrong: dict[str, float]) -> None:
    node = OmegaConf.merge(OmegaConf.load(config.conf_dir() / "loss" / f"{option}.yaml"), wrong)
    with pytest.raises(ChoiceError, match=rf"^weighting\.{next(iter(wrong))}=.*: must be positive and finite"):
        Objective(FINITE, V(), timesteps.uniform, config.build(node))


@pytest.mark.parametrize("wrong", [{"features": 0}, {"lr": 0.0}])
def test_uncertainty_is_refused_with_a_constant_without_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))}=0"):
        loss.Uncertainty(**wrong)


def test_published_min_snr_never_trains_the_terminal_step_and_plus_one_does() -> None:
    terminal = ZERO_TERMINAL.at(torch.tensor([999]))
    assert loss.min_snr(terminal, V()).item() == 0
    assert loss.min_snr_plus_one(terminal, V()).item() == 1


@allowed
@pytest.mark.parametrize("name", sorted(path.stem for path in (config.conf_dir() / "loss").glob("*.yaml")))
def test_every_loss_option_is_finite_over_the_whole_table(name: str, schedule: Schedule, p: Parameterization) -> None:
    weighting = config.build(OmegaConf.load(config.conf_dir() / "loss" / f"{name}.yaml"))
    weights = weighting(schedule.at(ALL), p)
    assert weights.shape == (1000,)
    assert weights.dtype == torch.float32
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert (weights > 0).any()
