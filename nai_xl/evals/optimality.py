"""evals=optimality: how much worse than the best possible model is this one, at each noise level?

Of data=gaussian the ideal denoiser D is known, and with it the lowest loss that any model can have. A model's mean
squared error of x0 is that of D plus its mean squared distance from D, since D is the conditional mean. So the distance
is the excess loss, and it is measured with far less noise than a difference of two losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from nai_xl.data.loader import Encoded, LatentRef
from nai_xl.data.rows import Item
from nai_xl.diffusion.denoiser import predict
from nai_xl.diffusion.ideal import Law
from nai_xl.errors import UserError
from nai_xl.evals.painter import Studio
from nai_xl.evals.val_loss import by_canvas, by_item, first, item_name, timestep_at
from nai_xl.interfaces import Bucket, Direction, Schedule
from nai_xl.record.items import report
from nai_xl.rng import generator

BANDS = (-5, -2, 1, 4, 7)  # log-SNR; levels are the whole numbers in them, but for 7, which no band holds
LEVELS = tuple(range(BANDS[0], BANDS[-1]))
TERMINAL = len(LEVELS)  # the number of the last timestep among the levels, whatever its SNR
Row = tuple[str, int, float, float]  # item, level, excess, excess as a share of the lowest loss


@dataclass(frozen=True)
class Optimality:
    """Every `every` steps the mean squared distance of `count` held-out fields' x0 from the ideal denoiser's.

    It is the loss in excess of the lowest one, in normalised latents, with the averaged weights and without guidance.
    optimality/excess_logsnr_<low>_<high> is its mean over the levels low, low + 1 ... high - 1 of log-SNR;
    optimality/excess is its mean over all of these; optimality/relative the mean of excess / lowest loss, in which no
    level outweighs the others. A band of which the schedule lacks a level is left out, and so are the two then.
    optimality/excess_terminal is that of the last timestep.
    """

    better: ClassVar[Mapping[str, Direction]] = {"optimality/": "lower"}
    equal_within: ClassVar[Mapping[str, str]] = {}
    incomparable_over: ClassVar[Mapping[str, Sequence[str]]] = {}
    changes_weights: ClassVar[bool] = False
    looks_at: ClassVar[str] = "text_to_image"

    every: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)] = 64
    seed: int = 0
    batch: Annotated[int, Field(ge=1)] = 64

    def texts(self, items: Sequence[Item]) -> list[str]:
        """None: the captions of held-out fields are encoded together with the fields."""
        return []

    def held_out(self, items: Sequence[Item]) -> list[Item]:
        """The first `count`. Raises UserError where none is held out, or the ideal denoiser is not known."""
        return first(known(items, "optimality"), self.count)

    def run(self, step: int, studio: Studio) -> dict[str, float]:
        """Measure, write the values of each field, and return their means."""
        with studio.ema.swapped_in():
            batches = by_canvas(studio.encoded, self.held_out, self.batch)
            rows = [row for some in batches for row in self._measure(some, studio)]
        reached = {number for _, number, _, _ in rows}
        bands = {(low, high): range(low - BANDS[0], high - BANDS[0]) for low, high in pairwise(BANDS)}
        table = {
            f"optimality/excess_logsnr_{low}_{high}": by_item((i, e) for i, k, e, _ in rows if k in numbers)
            for (low, high), numbers in bands.items()
            if reached.issuperset(numbers)
        }
        table["optimality/excess_terminal"] = by_item((i, e) for i, k, e, _ in rows if k == TERMINAL)
        if reached.issuperset(range(TERMINAL)):
            table["optimality/excess"] = by_item((i, e) for i, k, e, _ in rows if k < TERMINAL)
            table["optimality/relative"] = by_item((i, share) for i, k, _, share in rows if k < TERMINAL)
        return report(studio.run_dir, step, table)

    @torch.no_grad()
    def _measure(self, some: Sequence[tuple[Item, LatentRef]], studio: Studio) -> Iterator[Row]:
        encoded, device = studio.encoded, studio.device
        names, laws = [item_name(item) for item, _ in some], [law_of(item, ref, encoded) for item, ref in some]
        bucket = some[0][1].placement.bucket
        schedule = studio.schedule.for_canvas(bucket.height, bucket.width)
        x0 = torch.stack([encoded.latents_of(ref) for _, ref in some]).to(device)
        told = conditions([item.caption for item, _ in some], bucket, studio)
        for number, t in self._levels(schedule).items():
            level = schedule.at(t.to(device).expand(len(some)))
            noise = torch.stack([self.noise(name, number, x0.shape[1:]) for name in names]).to(device)
            xt = schedule.add_noise(x0, noise, level)
            out = predict(studio.denoise, xt, level.t, **told).float()
            found = studio.parameterization.to_x0(xt, out, level).double().cpu()
            for row, (name, law) in enumerate(zip(names, laws, strict=True)):
                here = slice(row, row + 1)
                one = type(level)(level.t[here], level.alpha[here], level.sigma[here])
                excess = float((found[row] - law.denoise(xt[here], one)[0]).square().mean())
                yield name, number, excess, excess / float(law.optimum(one))

    def _levels(self, schedule: Schedule) -> dict[int, Tensor]:
        """Number of the level -> timestep, between entries of the table: those that the schedule reaches."""
        between = enumerate(timestep_at(schedule, wanted) for wanted in LEVELS)
        last = schedule.inference_timesteps(1)[0]
        return {number: torch.tensor(t) for number, t in between if t is not None} | {TERMINAL: last}

    def noise(self, item: str, number: int, shape: Sequence[int]) -> Tensor:
        """The noise of a field at a level, standard normal float32 of `shape`; the same in every run."""
        return torch.randn(tuple(shape), generator=generator(self.seed, number, f"optimality {item}"))


# --- shared with evals=mean_kept --------------------------------------------------------------------------------------


def known(items: Sequence[Item], evaluator: str) -> Sequence[Item]:
    """`items`. Raises UserError if there is none, or one whose distribution is not known."""
    if any(item.drawn is None for item in items[:1]):
        raise UserError(f"evals={evaluator} needs fields whose distribution is known; set data=gaussian")
    if not items:
        raise UserError(f"evals={evaluator} needs fields that are not trained on; set data=gaussian data.held_out=0.1")
    return items


def law_of(item: Item, ref: LatentRef, encoded: Encoded) -> Law:
    """The distribution of an item's normalised latents on its canvas."""
    assert item.drawn is not None  # `known` has seen to it
    return item.drawn.law(ref.placement.bucket).normalised(encoded.mean, encoded.std)


def conditions(captions: Sequence[str], bucket: Bucket, studio: Studio) -> dict[str, Tensor]:
    """context, pooled and time_ids of captions, each said to be of a whole image as large as the canvas."""
    pairs = [studio.condition(caption) for caption in captions]
    size = [float(bucket.height), float(bucket.width)]
    context, pooled = (torch.stack(tensors).to(studio.device) for tensors in zip(*pairs, strict=True))
    return {
        "context": context,
        "pooled": pooled,
        "time_ids": torch.tensor([[*size, 0.0, 0.0, *size]] * len(captions), device=studio.device),
    }
