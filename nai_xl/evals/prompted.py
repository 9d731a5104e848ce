"""What evaluators that measure samples have in common: fixed prompts, fixed noise, canvases of several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nai_xl.data.rows import Item
from nai_xl.evals.contact_sheet import Prompt
from nai_xl.evals.painter import Studio
from nai_xl.interfaces import Bucket, Direction
from nai_xl.record.items import report

STEP = 32  # pixels: an SDXL UNet halves latents twice, and a latent is 8 pixels wide
Sizes = Annotated[Sequence[Annotated[float, Field(gt=0)]], Field(min_length=1)]
Values = dict[str, dict[str, float]]  # metric -> item -> value


@dataclass(frozen=True)
class PromptedEvaluator:
    """Every `every` steps `seeds` samples of each prompt on square canvases of `sizes` times the native edge.

    The noise depends on the prompt's place and the seed, never on the run. Samples take `steps` steps and else what
    sampling.* says; `batch` of them are painted together on the native canvas, as many pixels at once on larger ones.
    """

    better: ClassVar[Mapping[str, Direction]] = {}
    equal_within: ClassVar[Mapping[str, str]] = {}
    incomparable_over: ClassVar[Mapping[str, Sequence[str]]] = {}
    changes_weights: ClassVar[bool] = False
    looks_at: ClassVar[str] = "text_to_image"
    within_schedule: ClassVar[tuple[str, ...]] = ("steps",)

    every: Annotated[int, Field(ge=1)]
    seeds: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] = 16
    sizes: Sizes = (1,)
    batch: Annotated[int, Field(ge=1)] = 16

    def prompts(self) -> Mapping[str, str]:
        """Name of each prompt -> its text."""
        raise NotImplementedError

    def measure(self, name: str, pixels: NDArray[np.uint8]) -> Mapping[str, float]:
        """Metric -> value, of one sample [H, W, 3] of this prompt."""
        raise NotImplementedError

    def texts(self, items: Sequence[Item]) -> list[str]:
        return list(self.prompts().values())

    def held_out(self, items: Sequence[Item]) -> list[Item]:
        """None: the prompt says what a sample should show."""
        return []

    def run(self, step: int, studio: Studio) -> dict[str, float]:
        """Paint, measure, write the values of each sample, and return their means."""
        table: Values = {}
        with studio.ema.swapped_in():
            for size in self.sizes:
                for item, found in self._measured(studio, size):
                    for metric, value in found.items():
                        table.setdefault(metric + suffix(size), {})[item] = value
        return report(studio.run_dir, step, table) | self.summary(table)

    def summary(self, table: Values) -> dict[str, float]:
        """Metrics that are not simply a mean over samples."""
        return {}

    def _measured(self, studio: Studio, size: float) -> Iterator[tuple[str, Mapping[str, float]]]:
        painter = replace(studio, sampling=replace(studio.sampling, steps=self.steps))
        canvas = enlarged(studio.square, size)
        batch = max(1, int(self.batch / size**2))
        prompts = self.prompts()
        for seed in range(self.seeds):
            images = painter.paint([Prompt(text, canvas) for text in prompts.values()], seed, batch=batch)
            for name, image in zip(prompts, images, strict=True):
                yield f"{name}/{seed}", self.measure(name, np.asarray(image))


def enlarged(square: Bucket, size: float) -> Bucket:
    """The canvas of `size` times the edge, in steps that the UNet can halve."""
    edge = max(STEP, round(square.width * size / STEP) * STEP)
    return Bucket(edge, edge)


def suffix(size: float) -> str:
    """Of a metric's name: nothing on the native canvas, _2x on one of twice its edge."""
    return "" if size == 1 else f"_{size:g}x"
