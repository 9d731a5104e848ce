"""Sampling from a trained network, exactly on the schedule it was trained with.

Every solver walks the probability-flow ODE from the last timestep, which is pure noise on a zero-terminal schedule, to
the clean latents at alpha = 1, sigma = 0. A step is given the network's x0 at one level and finds x at the next.
Neither end is capped, although sigma / alpha is infinite at the first and log(alpha / sigma) at the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nai_xl.diffusion.denoiser import predict
from nai_xl.interfaces import Denoiser, NoiseLevel, Parameterization, Schedule

Method = Literal["ddim", "euler", "dpmpp_2m"]


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: number of steps, guidance scale, guidance rescale (0 = off), and the ODE solver.

    Raises ValueError for fewer steps than 1, a rescale outside [0, 1] and an unknown method.
    """

    changes_weights: ClassVar[bool] = False

    steps: int = 28
    guidance: float = 5.0
    rescale: float = 0.7
    method: Method = "ddim"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be at least 1")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale}: must lie in [0, 1]")
        if self.method not in SOLVERS:
            raise ValueError(f"method={self.method}: there is {', '.join(SOLVERS)}")


class Estimate(NamedTuple):
    """The clean latents [B,4,h,w] as the network sees them at a level, whose alpha and sigma broadcast with them."""

    x0: Tensor
    level: NoiseLevel


# --- solvers ----------------------------------------------------------------------------------------------------------

Solver = Callable[[Tensor, Estimate, NoiseLevel, Estimate | None], Tensor]
"""x at `now`'s level, `now`, the next level, the estimate of the step before if there was one -> x at that level."""


def ddim(x: Tensor, now: Estimate, to: NoiseLevel, before: Estimate | None = None) -> Tensor:
    """DDIM without added noise, Song et al. 2010.02502 eq. 12: x0 and the noise that x implies, mixed anew.

    From pure noise the implied noise is x itself, and the step x' = alpha' x0 + sigma' n is exact.
    """
    noise = (x - now.level.alpha * now.x0) / now.level.sigma
    return to.alpha * now.x0 + to.sigma * noise


def euler(x: Tensor, now: Estimate, to: NoiseLevel, before: Estimate | None = None) -> Tensor:
    """One Euler step of dz/ds = (z - x0) / s, z = x / alpha, s = sigma / alpha; Karras et al. 2206.00364, eq. 1, 3.

    From s = infinity the step's limit is z' = x0 + s' n, which for v is s' n - F(n); NovelAI V3, 2409.15997, appendix.
    """
    if now.level.alpha == 0:
        return to.alpha * now.x0 + to.sigma * x
    s, s_next = now.level.sigma / now.level.alpha, to.sigma / to.alpha
    z = x / now.level.alpha
    return to.alpha * (z + (s_next - s) * (z - now.x0) / s)


def dpmpp_2m(x: Tensor, now: Estimate, to: NoiseLevel, before: Estimate | None = None) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2211.01095, algorithm 2, in steps h of lambda = log(alpha / sigma).

    x0 is extrapolated by its last change over 2r, r = h_last / h. First order where there is no step before; where that
    step came from pure noise, since r is infinite then; and to the clean end, where h is infinite.
    """
    h, x0 = _log_ratio(to) - _log_ratio(now.level), now.x0
    if before is not None and to.sigma > 0:
        r = (_log_ratio(now.level) - _log_ratio(before.level)) / h
        x0 = x0 + (x0 - before.x0) / (2 * r)
    return to.sigma / now.level.sigma * x - to.alpha * torch.expm1(-h) * x0


def _log_ratio(level: NoiseLevel) -> Tensor:
    """lambda = log(alpha / sigma): -infinity in pure noise, +infinity at the clean end."""
    return level.alpha.log() - level.sigma.log()


SOLVERS: dict[str, Solver] = {"ddim": ddim, "euler": euler, "dpmpp_2m": dpmpp_2m}


# --- guidance ---------------------------------------------------------------------------------------------------------


def rescale_guidance(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """Guidance rescale, Lin et al. 2305.08891 eq. 15-16: give the guided prediction the conditional one's std."""
    if phi == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    rescaled = guided * (conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return phi * rescaled + (1 - phi) * guided


def guided_x0(
    denoise: Denoiser,
    x: Tensor,
    level: NoiseLevel,
    parameterization: Parameterization,
    conditions: dict[str, Tensor],
    sampling: Sampling,
) -> Tensor:
    """x0 [B,4,h,w] by classifier-free guidance, Ho and Salimans 2207.12598. `level` is of [B].

    `conditions` hold 2B rows, the unconditional ones first.
    """
    told = conditions["context"], conditions["pooled"], conditions["time_ids"]
    out = predict(denoise, torch.cat([x, x]), level.t.repeat(2), *told)
    negative, positive = out.float().chunk(2)
    prediction = rescale_guidance(negative + sampling.guidance * (positive - negative), positive, sampling.rescale)
    return parameterization.to_x0(x, prediction, level)


# --- the loop ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_latents(
    denoise: Denoiser,
    noise: Tensor,
    schedule: Schedule,
    parameterization: Parameterization,
    *,
    condition: dict[str, Tensor],
    unconditional: dict[str, Tensor],
    sampling: Sampling,
) -> Tensor:
    """Normalised clean latents [B,4,h,w] float32 from `noise` [B,4,h,w].

    `condition` and `unconditional` hold context [B,77k,D], pooled [B,P] and time_ids [B,6]. The schedule is that of the
    canvas: `schedule.for_canvas(height, width)`. Raises ValueError for more steps than the schedule has timesteps.
    """
    conditions = {name: torch.cat([unconditional[name], condition[name]]) for name in condition}
    solver = SOLVERS[sampling.method]
    timesteps = schedule.inference_timesteps(sampling.steps)
    levels = path(schedule, sampling.steps)
    x, before = noise.float(), None
    for t, level, following in zip(timesteps.to(noise.device), levels[:-1], levels[1:], strict=True):
        per_image = schedule.at(t.expand(len(x)))
        now = Estimate(guided_x0(denoise, x, per_image, parameterization, conditions, sampling), level)
        x, before = solver(x, now, following, before), now
    return x


def path(schedule: Schedule, steps: int) -> list[NoiseLevel]:
    """The steps + 1 levels of a run from the last timestep to the clean end, as scalars kept on the host.

    To look at them is not to wait for the device. Raises ValueError for more steps than the schedule has timesteps.
    """
    levels = schedule.at(schedule.inference_timesteps(steps))
    each = [NoiseLevel(*level) for level in zip(levels.t, levels.alpha, levels.sigma, strict=True)]
    return [*each, NoiseLevel(torch.tensor(0), torch.tensor(1.0), torch.tensor(0.0))]
