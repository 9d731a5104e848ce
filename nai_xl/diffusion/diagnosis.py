"""What a built objective does, in numbers and in sentences, before anything is trained.

Everything is computed from the objective's own functions, nothing from the names of the choices. Sources: [Lin] Common
Diffusion Noise Schedules and Sample Steps are Flawed, 2305.08891; [NAI] Improvements to SDXL in NovelAI Diffusion V3,
2409.15997.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nai_xl.diffusion.loss import min_snr_plus_one
from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.timesteps import density

# The mean of a 128 x 128 latent (1024 x 1024 pixels) has 1/128 of a pixel's noise. From here on that is more than the
# data's own deviation, so that the mean brightness is lost as well; SDXL's 14.6 leaves it readable to 0.11. A smaller
# canvas loses its mean in proportion sooner: at 64 x 64 pixels from 8 on (experiments/ztsnr).
SDXL_EDGE, PURE_NOISE = 1024, 128.0
LITTLE = 0.02  # of the loss weight for a fifth of the timesteps: a tenth of an even share


@dataclass(frozen=True)
class Diagnosis:
    """Tables over the timesteps t = 0..T-1 of one objective, each [T] float64."""

    noise: Tensor  # sigma/alpha, infinite at zero terminal SNR
    weight: Tensor  # of the squared prediction error, divided by its mean if the objective does so
    density: Tensor  # probability of being drawn; sums to 1

    def __len__(self) -> int:
        return len(self.noise)

    @property
    def log_snr(self) -> Tensor:
        """[T] ln(alpha^2 / sigma^2), minus infinity at zero terminal SNR."""
        return -2 * self.noise.log()

    @property
    def share(self) -> Tensor:
        """[T] weight x density as a part of the whole; sums to 1. NaN when the whole is zero or infinite."""
        parts = torch.where(self.density > 0, self.weight * self.density, 0)
        return parts / parts.sum()

    @property
    def deciles(self) -> Tensor:
        """[10] the share of the loss weight in each tenth of the timesteps, from little noise to much."""
        tenth = torch.arange(len(self)) * 10 // len(self)
        return torch.zeros(10, dtype=torch.float64).index_add(0, tenth, self.share)

    @property
    def mean_weight(self) -> float:
        """The expected weight of a training sample."""
        return float(torch.where(self.density > 0, self.weight * self.density, 0).sum())


@torch.no_grad()
def diagnose(objective: Objective) -> Diagnosis:
    """The tables of `objective`, as it stands before its first step where parts of it learn."""
    level = objective.schedule.at(torch.arange(len(objective.schedule)))
    device = next((part.device for part in objective.learned.parameters()), level.t.device)
    weight = objective.weighting(
        replace(level, t=level.t.to(device), alpha=level.alpha.to(device), sigma=level.sigma.to(device)),
        objective.parameterization,
    )
    found = Diagnosis(
        noise=level.sigma.double() / level.alpha.double(),
        weight=weight.cpu().double(),
        density=density(objective.timesteps, objective.schedule),
    )
    return replace(found, weight=found.weight / found.mean_weight) if objective.normalize_weights else found


@torch.no_grad()
def sentences(objective: Objective, edge: int = SDXL_EDGE) -> list[str]:
    """What a person should know of `objective` before training with it on canvases of about `edge` x `edge` pixels;
    empty when there is nothing to say.
    """
    found = diagnose(objective)
    lines = [_end(objective, found, edge), _neglected(found)]
    return [line for line in lines if line]


def _end(objective: Objective, found: Diagnosis, edge: int) -> str:
    """On the last timestep, where sampling starts from pure noise."""
    last = float(found.noise[-1])
    if not objective.schedule.zero_terminal:
        left = f"which leaves the mean of {edge} x {edge} pixels readable"
        drift = "the model never sees pure noise, so samples drift to medium brightness ([Lin] 3.1, [NAI] 2.2)"
        readable = last < PURE_NOISE * edge / SDXL_EDGE
        return f"the noise ends at sigma/alpha = {last:.3g}, {left}: {drift}" if readable else ""
    if found.density[-1] == 0:
        return "the terminal step is practically never drawn: pure noise, where sampling starts, is not trained"
    if found.weight[-1] == 0:
        level = objective.schedule.at(torch.tensor([len(found) - 1]))
        other = float(min_snr_plus_one(level, objective.parameterization))
        cure = f"loss=minsnr_plus_one gives it {other:.3g}"
        return f"the terminal step has weight 0: pure noise, where sampling starts, is never trained; {cure}"
    return ""


def _neglected(found: Diagnosis) -> str:
    share = float(found.deciles[8:].sum())
    first = -(-len(found) * 8 // 10)
    return f"t >= {first} holds {100 * share:.2g} % of the loss weight (evenly: 20 %)" if share < LITTLE else ""
