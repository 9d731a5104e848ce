"""What task=text_to_image draws its batches from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from nai_xl.data.epoch_plan import EpochPlan, by_bucket
from nai_xl.data.index import Index
from nai_xl.data.loader import Encoded, PositionDataset, RankBatches, batches
from nai_xl.data.noise import TrainingNoise
from nai_xl.data.report import Report, report, unseen
from nai_xl.data.sample_weights import TagRow, by_tag, write_tags
from nai_xl.data.sample_weights import in_words as weights_in_words
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.loop import RunSettings
from nai_xl.evals import canvas_figure
from nai_xl.files import write_atomically
from nai_xl.interfaces import (
    Batch,
    Bucket,
)
from nai_xl.model.latents import Stored, in_words, write_statistics
from nai_xl.model.text import Tokens
from nai_xl.record.run_dir import RunDirectory


@dataclass(frozen=True)
class TextImages:
    """Encoded images and captions, and how a sample is drawn from them.

    strata: images of an optimizer step -> over how many positions timesteps are spread evenly; None: over none. run,
    world: the training that the table at its start tells of. tokens: what the loader tells of texts that the step
    encodes; None where they are encoded too.
    """

    encoded: Encoded
    captions: Any
    noise: TrainingNoise
    strata: Callable[[int], int | None]
    run: RunSettings
    world: int
    tokens: Tokens | None = None
    stored: Stored = "fp32"

    @property
    def index(self) -> Index:
        return self.encoded.index

    @property
    def canvases(self) -> set[Bucket]:
        return set(self.encoded.latents.assigned.buckets)

    def batches(self, settings: RunSettings, strategy: Strategy, *, start: int) -> DataLoader[Batch]:
        per_step = settings.images_per_step(strategy.world)
        sampler = RankBatches(
            self._plan(settings, strategy.world),
            start=start * per_step,
            batch_size=settings.batch_size,
            rank=strategy.rank,
            world=strategy.world,
        )
        return batches(
            self.encoded,
            self.captions,
            sampler,
            workers=settings.workers,
            strata=self.strata(per_step),
            noise=self.noise,
            tokens=self.tokens,
        )

    def _plan(self, settings: RunSettings, world: int) -> EpochPlan:
        buckets = by_bucket(self.encoded.latents.assigned.of)
        return EpochPlan(buckets, settings.seed, settings.chunk_size(world))

    @property
    def _weighted(self) -> bool:
        return bool((self.encoded.weights != self.encoded.weights[:1]).any())

    @cached_property
    def _tags(self) -> list[TagRow]:
        return by_tag(self.index, self.encoded.weights)

    @cached_property
    def _report(self) -> Report:
        return report(self.encoded.latents.bucketing, self.index.items.sizes)

    def one_of_each_shape(self, size: int) -> Iterator[Batch]:
        """In the buckets' order by size, whatever the run meets first: graphs depend on the order of shapes, so a run
        that is continued gets those that it had.
        """
        sample = PositionDataset(self.encoded, self.captions, seed=0, tokens=self.tokens)[0, 0]
        generator = torch.Generator().manual_seed(0)
        return (random_batch(sample, bucket, size, generator) for bucket in sorted(self.canvases))

    def described(self) -> Mapping[str, str]:
        encoded, count = self.encoded, len(self.index.items)
        held = len(encoded.index.held_out)
        images = f"{count}" + (f", {held} more held out" if held else "") + encoded.index.skipped.in_words()
        positions = self.run.steps(count, self.world) * self.run.images_per_step(self.world)
        missed = unseen(self._plan(self.run, self.world), positions, merges=encoded.latents.bucketing.merge_small)
        return {
            "images": images,
            **self._report.rows(),
            **dict(missed),
            **({"sample weights": weights_in_words(encoded.weights, self._tags)} if self._weighted else {}),
            "raw latents": in_words((encoded.mean, encoded.std)),
        }

    def figure(self) -> Image.Image:
        return canvas_figure.canvases(self._report, len(self.index.skipped.of_images()))

    def counted(self) -> str:
        keys = self.encoded.texts
        texts = "texts are encoded in the steps" if keys is None else f"{keys.count} texts"
        return f"{self.encoded.latents.total} latents of {len(self.index.items)} images, {texts}"

    def write(self, run: RunDirectory) -> None:
        self.index.skipped.write(run.skipped)
        if self._weighted:
            write_tags(self._tags, run.tag_weights)
        run.claim_data(self.index.fingerprint(), len(self.index.items))
        statistics = (self.encoded.mean, self.encoded.std)
        write_atomically(run.latents, lambda path: write_statistics(path, statistics, self.stored))


def random_batch(sample: Batch, bucket: Bucket, batch_size: int, generator: torch.Generator) -> Batch:
    """A Batch of `bucket`'s shape with random numbers in place of images and texts: products of zeros run faster.

    `sample` is any of the data set, for the shapes and types of everything but the latents.
    """

    def normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.dtype)

    latents = (batch_size, sample.latents.shape[1], bucket.height // 8, bucket.width // 8)
    repeated = {name: _repeated(getattr(sample, name), batch_size) for name in ("weight", "position", "item")}
    return replace(
        sample,
        **repeated,
        latents=normal(latents, sample.latents),
        noise=normal(latents, sample.noise),
        perturbation=torch.zeros(batch_size, 1, 1, 1),
        context=normal((batch_size, *sample.context.shape[1:]), sample.context),
        pooled=normal((batch_size, *sample.pooled.shape[1:]), sample.pooled),
        chunks=_repeated(sample.chunks, batch_size),
        time_ids=_repeated(sample.time_ids, batch_size),
        u=torch.rand(batch_size, generator=generator, dtype=torch.float64),
    )


def _repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor[:1].expand(count, *tensor.shape[1:]).clone()
