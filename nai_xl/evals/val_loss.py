"""evals=val_loss: the error on images that are never trained on, at fixed noise levels, with fixed noise.

The noise is a function of the evaluator's seed, the image and the place in the grid, and of nothing else. So all runs
that hold out the same images see the same noise, whatever their seed, schedule or loss, and any difference between
their results is a difference between their models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nai_xl.data.cache import content_key
from nai_xl.data.epoch_plan import by_bucket, numbered
from nai_xl.data.loader import Encoded, LatentRef
from nai_xl.data.rows import Item
from nai_xl.diffusion.denoiser import predict
from nai_xl.engine.meter import bands
from nai_xl.errors import UserError
from nai_xl.evals.painter import Studio
from nai_xl.interfaces import Direction, Schedule
from nai_xl.record.items import mean, report
from nai_xl.rng import generator

# log-SNR of the levels at which runs of different schedules are comparable; SDXL's own schedule covers 7.1 to -5.4
LOG_SNR = (6, 3, 0, -3, -5)
# settings by which other latents are measured, or the network is told what it never saw: docs/evaluation.md
OTHER_LATENTS = (
    "bucketing", "native.resolution", "objective.micro_conditioning", "evals.val_loss.timesteps", "evals.val_loss.seed",
)  # fmt: skip
# item, place in the grid, error of the prediction, error of x0, error of x0 before normalisation
Rows = list[tuple[str, int, float, float, float]]


@dataclass(frozen=True)
class ValLoss:
    """Every `every` steps the unweighted squared error of `count` held-out images with the averaged weights.

    The grid is a sampler's of `timesteps` steps, the terminal one included. val/loss is the error of the network's
    prediction and val/x0_loss that of the clean latent that follows from it, both means over images and grid.
    val/loss_band_<low>_<high> is val/loss within a band of timesteps. val/x0_loss_terminal is val/x0_loss at the last
    timestep, val/x0_loss_terminal_raw the same in latents before normalisation. val/x0_loss_logsnr_<l> is val/x0_loss
    at a log-SNR that is the same in all schedules, where the schedule reaches it.
    """

    better: ClassVar[Mapping[str, Direction]] = {"val/": "lower", "val/loss": "lower", "val/x0_loss_logsnr_0": "lower"}
    equal_within: ClassVar[Mapping[str, str]] = {"val/": "2%"}
    incomparable_over: ClassVar[Mapping[str, Sequence[str]]] = {
        "val/loss": ("schedule", "parameterization", "latents", *OTHER_LATENTS),
        "val/x0_loss": ("schedule", "latents", *OTHER_LATENTS),
        "val/x0_loss_logsnr": ("latents", *OTHER_LATENTS),
        "val/x0_loss_terminal_raw": ("schedule", *OTHER_LATENTS),
    }
    changes_weights: ClassVar[bool] = False
    looks_at: ClassVar[str] = "text_to_image"
    within_schedule: ClassVar[tuple[str, ...]] = ("timesteps",)

    every: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)] = 16
    timesteps: Annotated[int, Field(ge=1)] = 8
    seed: int = 0
    batch: Annotated[int, Field(ge=1)] = 16

    def texts(self, items: Sequence[Item]) -> list[str]:
        """None: the captions of held-out images are encoded together with the images."""
        return []

    def held_out(self, items: Sequence[Item]) -> list[Item]:
        """The first `count`, no image twice. Raises UserError when none is held out."""
        if not items:
            raise UserError("evals=val_loss needs images that are not trained on; set data.held_out=0.1, or more")
        return first(items, self.count)

    def run(self, step: int, studio: Studio) -> dict[str, float]:
        """Measure, write the values of each image, and return their means."""
        with studio.ema.swapped_in():
            batches = by_canvas(studio.encoded, self.held_out, self.batch)
            rows = [row for some in batches for row in self._measure(some, studio)]
        edges = bands(len(studio.schedule))
        grid = studio.schedule.inference_timesteps(self.timesteps).tolist()
        on_grid = [row for row in rows if row[1] < len(grid)]
        table = {
            "val/loss": by_item((item, error) for item, _, error, _, _ in on_grid),
            "val/x0_loss": by_item((item, error) for item, _, _, error, _ in on_grid),
            "val/x0_loss_terminal": by_item((item, error) for item, k, _, error, _ in on_grid if grid[k] == grid[0]),
            "val/x0_loss_terminal_raw": by_item((i, error) for i, k, _, _, error in on_grid if grid[k] == grid[0]),
        }
        for low, high in pairwise(edges):
            inside = ((item, error) for item, k, error, _, _ in on_grid if low <= grid[k] < high)
            table[f"val/loss_band_{low}_{high}"] = by_item(inside)
        for number, wanted in enumerate(LOG_SNR, start=len(grid)):
            table[f"val/x0_loss_logsnr_{wanted}"] = by_item((i, error) for i, k, _, error, _ in rows if k == number)
        return report(studio.run_dir, step, table)

    @torch.no_grad()
    def _measure(self, some: Sequence[tuple[Item, LatentRef]], studio: Studio) -> Rows:
        encoded, device = studio.encoded, studio.device
        names = [item_name(item) for item, _ in some]
        bucket = some[0][1].placement.bucket
        schedule = studio.schedule.for_canvas(bucket.height, bucket.width)
        x0 = torch.stack([encoded.latents_of(ref) for _, ref in some]).to(device)
        pairs = [studio.condition(item.caption) for item, _ in some]
        context, pooled = (torch.stack(tensors).to(device) for tensors in zip(*pairs, strict=True))
        time_ids = torch.tensor([ref.placement.time_ids(item.size) for item, ref in some], device=device)
        std = encoded.std.to(device)
        rows: Rows = []
        for number, t in self._levels(schedule).items():
            level = schedule.at(t.to(device).expand(len(some)))
            noise = torch.stack([self.noise(name, number, x0.shape[1:]) for name in names]).to(device)
            xt = schedule.add_noise(x0, noise, level)
            out = predict(studio.denoise, xt, level.t, context, pooled, time_ids).float()
            target = studio.parameterization.target(x0, noise, level)
            clean = studio.parameterization.to_x0(xt, out, level)
            raw = _squared(std * clean, std * x0)  # the means cancel
            errors = torch.stack([_squared(out, target), _squared(clean, x0), raw]).T.tolist()
            rows += [(name, number, *pair) for name, pair in zip(names, errors, strict=True)]
        return rows

    def _levels(self, schedule: Schedule) -> dict[int, Tensor]:
        """Place in the grid -> timestep: the sampler's, then those between entries of the table that have LOG_SNR."""
        grid = dict(enumerate(schedule.inference_timesteps(self.timesteps)))
        between = enumerate((timestep_at(schedule, wanted) for wanted in LOG_SNR), start=len(grid))
        return grid | {number: torch.tensor(t) for number, t in between if t is not None}

    def noise(self, item: str, number: int, shape: Sequence[int]) -> Tensor:
        """The noise of an image at a place of the grid, standard normal float32 of `shape`."""
        return torch.randn(tuple(shape), generator=generator(self.seed, number, f"val {item}"))


def first(items: Iterable[Item], count: int) -> list[Item]:
    """The first `count`, none twice."""
    found: dict[str, Item] = {}
    for item in items:
        if len(found) == count:
            break
        found.setdefault(item_name(item), item)
    return list(found.values())


def by_canvas(
    encoded: Encoded, chosen: Callable[[Sequence[Item]], Sequence[Item]], batch: int
) -> Iterator[list[tuple[Item, LatentRef]]]:
    """Those of the held-out images that are `chosen`, none twice, in lists of at most `batch` that share a canvas."""
    names = {item_name(item) for item in chosen([item for item, _ in encoded.held_out])}
    named = {item_name(item): (item, ref) for item, ref in encoded.held_out}
    pairs = [pair for name, pair in named.items() if name in names]
    for numbers in by_bucket(numbered([ref.placement.bucket for _, ref in pairs])):
        for start in range(0, len(numbers), batch):
            yield [pairs[n] for n in numbers[start : start + batch]]


def item_name(item: Item) -> str:
    """16 hex characters by which every run knows the same image and caption."""
    return content_key(item.content, item.caption)[:16]


def timestep_at(schedule: Schedule, log_snr: float) -> float | None:
    """The timestep, between entries of the table, whose SNR is exp(log_snr); None where the schedule does not reach.

    Schedule.at interpolates log-SNR linearly in t between entries of finite log-SNR, and this is its inverse.
    """
    table = schedule.at(torch.arange(len(schedule))).snr.double().log().numpy()
    finite = table[np.isfinite(table)]
    if not finite[-1] <= log_snr <= finite[0]:
        return None
    return float(np.interp(-log_snr, -finite, np.arange(len(finite))))


def _squared(one: Tensor, other: Tensor) -> Tensor:
    """[B,4,h,w] twice -> [B] float64 mean squared difference."""
    return (one.double() - other.double()).square().flatten(1).mean(1)


def by_item(pairs: Iterator[tuple[str, float]]) -> Mapping[str, float]:
    """The mean of each item's errors."""
    found: dict[str, list[float]] = {}
    for item, error in pairs:
        found.setdefault(item, []).append(error)
    return {item: mean(errors) for item, errors in found.items()}
