"""The training objective: the method's choices composed into one loss per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from nai_xl.diffusion.denoiser import predict
from nai_xl.diffusion.error import mse
from nai_xl.diffusion.loss import LearnedWeighting
from nai_xl.errors import ChoiceError
from nai_xl.interfaces import (
    Batch,
    Denoiser,
    NoiseLevel,
    Parameterization,
    PointwiseError,
    Schedule,
    TimestepSampler,
    Weighting,
)

QUADRATURE = 100_000  # values of u that stand for all; a multiple of 1000 makes the mean over SDXL's table exact


class Misfit(ChoiceError):
    """Choices that have no meaning together."""


@dataclass(frozen=True)
class Objective:
    """Composes the method's choices.

    Raises Misfit for choices that have no meaning together, and ChoiceError where a choice itself refuses a parameter
    or the schedule. Both name the field at fault.

    normalize_weights divides every weight by its expectation over the timesteps drawn, so that weightings differ in
    where they look and not in their scale. The expectation is a constant of the choices, computed once for each canvas
    size, rather than a batch's mean: the loss of a sample does not depend on its neighbours, on micro-batches or on
    processes, and arms of an ablation stay paired.

    Without micro_conditioning the network is told of every image that it is whole and as large as its canvas, which is
    what samples are asked for.
    """

    schedule: Schedule
    parameterization: Parameterization
    timesteps: TimestepSampler
    weighting: Weighting
    error: PointwiseError = mse
    normalize_weights: bool = False
    micro_conditioning: bool = True
    _expected: dict[tuple[int, int], float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.schedule.zero_terminal and not self.parameterization.defined_at_zero_snr:
            why = "is undefined on a schedule that ends at zero SNR: pure noise says nothing of x0"
            raise Misfit("parameterization", why, value=self.parameterization.prediction_type)
        if self.normalize_weights and self._learned_weighting is not None:
            raise Misfit("normalize_weights", "has no meaning for a weighting that learns its own scale", value="true")
        learned = self._learned_weighting
        if learned is not None and not (hasattr(learned, "penalty") and hasattr(learned, "parameter_group")):
            raise ChoiceError("weighting", "a module needs penalty and parameter_group; derive from LearnedWeighting")
        self._refuse_senseless_loss()

    @torch.no_grad()
    def _refuse_senseless_loss(self) -> None:
        """Try the sampler, and the weighting and the error on the whole table, before anything is loaded."""
        ends = torch.tensor([0, 1 - 2.0**-53], dtype=torch.float64)
        _asked("timesteps", lambda: self.timesteps(ends, self.schedule))
        level = self.schedule.at(torch.arange(len(self.schedule)))
        ones = torch.ones(len(self.schedule), 1, 1, 1)
        weights = _asked("weighting", lambda: self.weighting(level, self.parameterization))
        errors = _asked("error", lambda: self.error(ones, 0 * ones, level))
        for choice, values in (("weighting", weights), ("error", errors)):
            bad = ~values.isfinite() | (values < 0)
            if bad.any():
                t = int(bad.nonzero()[0])
                predicted = f"with prediction type {self.parameterization.prediction_type}"
                raise Misfit(choice, f"the value at timestep {t} is {values[t].item()} {predicted}")
        if not weights.any():
            raise Misfit("weighting", "the weight is 0 at every timestep, so nothing would be trained")

    def on_canvas(self, height: int, width: int) -> Objective:
        """The same with the noise levels of a canvas of height x width pixels alone."""
        return replace(self, schedule=self.schedule.for_canvas(height, width))

    @property
    def learned(self) -> nn.ModuleDict:
        """The parts that are trained along with the network, by name; empty for all but learned weightings."""
        return nn.ModuleDict({"weighting": part} if (part := self._learned_weighting) is not None else {})

    @property
    def _learned_weighting(self) -> LearnedWeighting | None:
        """The weighting, where it is a module; a function has nothing to learn."""
        return cast(LearnedWeighting, self.weighting) if isinstance(self.weighting, nn.Module) else None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups for `learned`, to stand after the network's."""
        return [part.parameter_group()] if (part := self._learned_weighting) is not None else []

    def expected_weight(self, height: int, width: int) -> float:
        """The weight's expectation over the timesteps drawn for a canvas of height x width pixels."""
        if (height, width) not in self._expected:
            schedule = self.schedule.for_canvas(height, width)
            u = (torch.arange(QUADRATURE, dtype=torch.float64) + 0.5) / QUADRATURE
            weights = self.weighting(schedule.at(self.timesteps(u, schedule)), self.parameterization)
            self._expected[height, width] = weights.double().mean().item()
        return self._expected[height, width]

    def __call__(self, unet: Denoiser, batch: Batch) -> tuple[Tensor, NoiseLevel]:
        """The weighted prediction error of every sample, [B] float32, and the noise levels drawn for them.

        The penalty of a learned weighting is added. The sample's own weight multiplies both.
        """
        height, width = (8 * side for side in batch.latents.shape[2:])
        schedule = self.schedule.for_canvas(height, width)
        level = schedule.at(self.timesteps(batch.u, schedule))
        xt = schedule.add_noise(batch.latents, batch.noise + batch.perturbation, level)
        time_ids = batch.time_ids if self.micro_conditioning else _whole(batch.time_ids)
        prediction = predict(unet, xt, level.t, batch.context, batch.pooled, time_ids)
        target = self.parameterization.target(batch.latents, batch.noise, level)
        loss = self.error(prediction, target, level) * self.weighting(level, self.parameterization)
        if self.normalize_weights:
            loss = loss / self.expected_weight(height, width)
        if self._learned_weighting is not None:
            penalty = self._learned_weighting.penalty(level)
            loss = loss if penalty is None else loss + penalty
        return loss * batch.weight, level


def _asked(choice: str, ask: Callable[[], Tensor]) -> Tensor:
    """What `ask` returns. Raises ChoiceError with the name of the choice in place of its ValueError."""
    try:
        return ask()
    except ValueError as error:
        raise ChoiceError(choice, str(error)) from error


def _whole(time_ids: Tensor) -> Tensor:
    """Of images that are as large as their canvases, [B,6]: h, w, 0, 0, h, w."""
    target = time_ids[:, 4:]
    return torch.cat([target, torch.zeros_like(target), target], dim=1)
