"""evals=mean_kept: how much of a field's mean survives in samples, and how much could?

Samples begin with pure noise, in whatever noise level training ended. If signal was left there, a model that has
learned to read the mean from its input reads it from that noise: samples have too little of their caption's mean, and
their means differ too little from each other. nai_xl.diffusion.ideal has both in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from nai_xl.data.loader import LatentRef
from nai_xl.data.rows import Item
from nai_xl.diffusion.ideal import Law, sampled
from nai_xl.diffusion.sampling import sample_latents
from nai_xl.evals.optimality import conditions, known, law_of
from nai_xl.evals.painter import Studio
from nai_xl.evals.val_loss import by_canvas, first, item_name
from nai_xl.interfaces import Direction, Schedule
from nai_xl.record.items import report
from nai_xl.rng import generator

METRICS = ("caption", "variance", "caption_ideal", "variance_ideal")


class Sample(NamedTuple):
    """A sample for a held-out field: the field's distribution, its canvas's schedule, the sample's mean [4] float64."""

    item: str
    caption: str
    law: Law
    schedule: Schedule
    mean: Tensor


@dataclass(frozen=True)
class MeanKept:
    """Every `every` steps a sample of each of `count` held-out fields' captions, without guidance.

    With m the caption's mean and x the mean of a sample, both over the canvas in each channel: mean_kept/caption is
    x.m / m.m, 1 if the mean comes out whole. mean_kept/variance is the variance of x around the average of all samples
    of the caption, over that of the data's. `_ideal`: what the ideal denoiser gives, with as many steps of the same
    sampler. The noise depends on the field and `seed` alone.
    """

    better: ClassVar[Mapping[str, Direction]] = {}  # 1 is best
    equal_within: ClassVar[Mapping[str, str]] = {}
    incomparable_over: ClassVar[Mapping[str, Sequence[str]]] = {}
    changes_weights: ClassVar[bool] = False
    looks_at: ClassVar[str] = "text_to_image"

    every: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=16)] = 128
    steps: Annotated[int, Field(ge=1)] = 28
    seed: int = 0
    batch: Annotated[int, Field(ge=1)] = 64

    def texts(self, items: Sequence[Item]) -> list[str]:
        """None: the captions of held-out fields are encoded together with the fields."""
        return []

    def held_out(self, items: Sequence[Item]) -> list[Item]:
        """The first `count`. Raises UserError where none is held out, or the distribution is not known."""
        return first(known(items, "mean_kept"), self.count)

    def run(self, step: int, studio: Studio) -> dict[str, float]:
        """Sample, write the values of each sample, and return their means."""
        with studio.ema.swapped_in():
            batches = by_canvas(studio.encoded, self.held_out, self.batch)
            samples = [sample for some in batches for sample in self._sample(some, studio)]
        table: dict[str, dict[str, float]] = {f"mean_kept/{what}": {} for what in METRICS}
        for caption in dict.fromkeys(sample.caption for sample in samples):
            same = [sample for sample in samples if sample.caption == caption]
            middle = torch.stack([sample.mean for sample in same]).mean(0)
            for sample in same:
                for what, value in self._values(sample, middle, len(same), studio).items():
                    table[f"mean_kept/{what}"][sample.item] = value
        return report(studio.run_dir, step, table)

    def _values(self, sample: Sample, middle: Tensor, count: int, studio: Studio) -> dict[str, float]:
        """What the sample kept, and the ideal denoiser's would. middle [4]: the average of its caption's `count`."""
        m, spectrum = sample.law.mean.flatten(), sample.law.spectrum[:, :1, :1]
        ideal = sampled(spectrum, sample.schedule, steps=self.steps, method=studio.sampling.method)
        values = {}
        if m.any():
            values["caption"] = float(sample.mean @ m / (m @ m))
            values["caption_ideal"] = float((ideal.mean_kept * m) @ m / (m @ m))
        if count > 1:
            own = spectrum.flatten() / sample.law.spectrum[0].numel()
            values["variance"] = float(((sample.mean - middle).square() / own).mean()) * count / (count - 1)
            values["variance_ideal"] = float(ideal.variance_kept.mean())
        return values

    @torch.no_grad()
    def _sample(self, some: Sequence[tuple[Item, LatentRef]], studio: Studio) -> Iterator[Sample]:
        items, laws = [item for item, _ in some], [law_of(item, ref, studio.encoded) for item, ref in some]
        bucket = some[0][1].placement.bucket
        schedule = studio.schedule.for_canvas(bucket.height, bucket.width)
        told = conditions([item.caption for item in items], bucket, studio)
        noise = torch.stack([self.noise(item_name(i), law.spectrum.shape) for i, law in zip(items, laws, strict=True)])
        latents = sample_latents(
            studio.denoise,
            noise.to(studio.device),
            schedule,
            studio.parameterization,
            condition=told,
            unconditional=told,
            sampling=replace(studio.sampling, steps=self.steps, guidance=1.0, rescale=0.0),
        )
        for item, law, x in zip(items, laws, latents.double().cpu().mean((2, 3)), strict=True):
            yield Sample(item_name(item), item.caption, law, schedule, x)

    def noise(self, item: str, shape: Sequence[int]) -> Tensor:
        """The first noise of a field's sample, standard normal float32 of `shape`; the same in every run."""
        return torch.randn(tuple(shape), generator=generator(self.seed, 0, f"mean_kept {item}"))
