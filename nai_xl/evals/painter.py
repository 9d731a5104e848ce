"""Evaluators: what is looked at while a run goes on. All see the averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from nai_xl.data.images import on_canvas
from nai_xl.data.index import Item, open_rgb
from nai_xl.data.loader import Encoded
from nai_xl.diffusion.sampling import Sampling, sample_latents
from nai_xl.errors import UserError
from nai_xl.evals.contact_sheet import Prompt, contact_sheet
from nai_xl.interfaces import Bucket, Denoiser, Ema, Parameterization, Schedule, Tracker
from nai_xl.rng import generator

PIXELS = 2 * 1024 * 1024  # sampled at once


@dataclass(kw_only=True)
class Painter:
    """All that is needed to paint a prompt with a model."""

    denoise: Denoiser
    schedule: Schedule
    parameterization: Parameterization
    sampling: Sampling
    condition: Callable[[str], tuple[Tensor, Tensor]]  # text -> context [77k,D], pooled [P]
    decode: Callable[[Tensor], list[Image.Image]]  # normalised latents [B,4,h,w] -> images
    device: torch.device

    def paint(
        self, prompts: Sequence[Prompt], seed: int, *, negative: str = "", batch: int | None = None
    ) -> list[Image.Image]:
        """One image a prompt. Some prompts of one canvas are sampled together, at most `batch`, and decoded one by one,
        which takes no more memory than a training step; the noise depends on seed and place only.
        """
        images: dict[int, Image.Image] = {}
        for bucket in dict.fromkeys(prompt.bucket for prompt in prompts):
            same = [i for i, prompt in enumerate(prompts) if prompt.bucket == bucket]
            count = bucket.at_once(PIXELS, most=batch or len(same))
            for rows in (same[first : first + count] for first in range(0, len(same), count)):
                latents = self._sample([prompts[i].text for i in rows], rows, bucket, seed, negative)
                images |= {row: self.decode(latent[None])[0] for row, latent in zip(rows, latents, strict=True)}
        return [images[i] for i in range(len(prompts))]

    def _sample(self, texts: list[str], rows: list[int], bucket: Bucket, seed: int, negative: str) -> Tensor:
        shape = (4, bucket.height // 8, bucket.width // 8)
        noise = torch.stack([torch.randn(shape, generator=generator(seed, row, "sample")) for row in rows])
        return sample_latents(
            self.denoise,
            noise.to(self.device),
            self.schedule.for_canvas(bucket.height, bucket.width),
            self.parameterization,
            condition=self._conditions(texts, bucket),
            unconditional=self._conditions([negative] * len(texts), bucket),
            sampling=self.sampling,
        )

    def _conditions(self, texts: list[str], bucket: Bucket) -> dict[str, Tensor]:
        pairs = [self.condition(text) for text in texts]
        size = [float(bucket.height), float(bucket.width)]
        return {
            "context": torch.stack([context for context, _ in pairs]).to(self.device),
            "pooled": torch.stack([pooled for _, pooled in pairs]).to(self.device),
            "time_ids": torch.tensor([[*size, 0.0, 0.0, *size]] * len(texts), device=self.device),
        }


@dataclass(kw_only=True)
class Studio(Painter):
    """What an evaluator sees of a run: a painter with the model under training, its averages, data and tracker."""

    ema: Ema
    tracker: Tracker
    encoded: Encoded
    square: Bucket  # the canvas of prompts that have no image
    run_dir: Path


@dataclass
class SampleGrid:
    """Every `every` steps a grid of fixed prompts and fixed noise, painted with the averaged weights.

    Without `prompts`, `count` training captions spread over the data are taken, and the training image stands beside
    each sample.
    """

    changes_weights: ClassVar[bool] = False
    looks_at: ClassVar[str] = "text_to_image"

    every: int
    count: int = 12
    seed: int = 0
    prompts: Sequence[str] | None = None
    _prompts: list[Prompt] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.every < 1 or self.count < 1:
            raise UserError("evals.sample_grid: every and count must be at least 1")

    def texts(self, items: Sequence[Item]) -> list[str]:
        """The prompts, known before training so that their text conditions can be cached."""
        return list(self.prompts) if self.prompts else [item.caption for item in self.picked(items)]

    def held_out(self, items: Sequence[Item]) -> list[Item]:
        """None: its pictures are of the training."""
        return []

    def picked(self, items: Sequence[Item]) -> list[Item]:
        """`count` items evenly spread over the index."""
        count = min(self.count, len(items))
        return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]

    def run(self, step: int, studio: Studio) -> dict[str, float]:
        """Paint the grid and hand it to the tracker as the figure "samples"."""
        if not self._prompts:
            self._prompts = self._from_texts(studio) if self.prompts else self._from_images(studio)
        with studio.ema.swapped_in():
            samples = studio.paint(self._prompts, self.seed)
        studio.tracker.figure("samples", step, contact_sheet(self._prompts, samples))
        return {}

    def _from_texts(self, studio: Studio) -> list[Prompt]:
        return [Prompt(text, studio.square) for text in self.prompts or ()]

    def _from_images(self, studio: Studio) -> list[Prompt]:
        placed = dict(zip(studio.encoded.index.items, studio.encoded.latents, strict=True))
        chosen = [(item, placed[item][0].placement) for item in self.picked(studio.encoded.index.items)]
        return [Prompt(item.caption, p.bucket, on_canvas(open_rgb(item.path), p)) for item, p in chosen]
