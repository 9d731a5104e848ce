"""Painting prompts with a model, and what an evaluator sees of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nai_xl.data.loader import Encoded
from nai_xl.diffusion.sampling import Sampling, sample_latents
from nai_xl.evals.contact_sheet import Prompt
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
