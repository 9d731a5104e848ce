"""task=vae_decoder: an autoencoder learns to paint what its encoder has seen of the user's own images.

A decoder that was trained on other images paints theirs: NovelAI V3, 2409.15997, section 5, has its decoder fine-tuned
on its own domain. With `trained=all` the whole autoencoder is trained, which is how model=tiny got its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nai_xl.data.bucketing import Assigned, assigned
from nai_xl.data.epoch_plan import EpochPlan, by_bucket
from nai_xl.data.index import Index, refuse_empty, refuse_without_pictures
from nai_xl.data.loader import RankBatches, whole_batches
from nai_xl.data.pixels import PixelBatch, PixelDataset, unreadable
from nai_xl.data.report import Report, report, unseen
from nai_xl.data.rows import Item
from nai_xl.distributed import activity
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.assemble import State
from nai_xl.engine.loop import RunSettings
from nai_xl.engine.nonfinite import Sample, Traced
from nai_xl.errors import UserError
from nai_xl.evals import canvas_figure
from nai_xl.evals.reconstruction import AutoencoderStudio
from nai_xl.interfaces import Bucketing, Evaluator, Losses, Stateful, Tracker
from nai_xl.memory.action import MemoryAction
from nai_xl.model.autoencoder import save_autoencoder, trainable_autoencoder
from nai_xl.record.run_dir import RunDirectory
from nai_xl.task.task import refuse_other_tasks

Share = Annotated[float, Field(ge=0)]
TOGETHER = 256  # pictures that are looked at before the next are listed


@dataclass(kw_only=True)
class VaeDecoder:
    """An autoencoder learns to paint pictures again, by the mean squared error of each pixel.

    trained: `decoder` freezes the encoder, so that latents keep their meaning and any network trained on them its use;
    `all` trains both. latent_noise: share of a latent channel's deviation that is added before decoding, for a decoder
    that forgives a sampler's small errors. channel_pull: weight of each latent channel's squared distance from mean 0
    and deviation 1, with trained=all. zoom and recolour: see data/pixels.py.

    Delivered is the autoencoder as a diffusers folder, pipeline/vae. A field without a default is the config's group of
    its name.
    """

    bucketing: Bucketing
    evals: Sequence[Evaluator]
    memory: Sequence[MemoryAction]
    run: RunSettings
    trained: Literal["decoder", "all"] = "decoder"
    latent_noise: Share = 0.0
    channel_pull: Share = 0.0
    zoom: Annotated[float, Field(ge=1)] = 1.0
    recolour: bool = False
    timesteps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.channel_pull and self.trained == "decoder":
            reason = "moves the encoder, which task.trained=decoder freezes; set task.trained=all"
            raise ValueError(f"channel_pull={self.channel_pull}: {reason}")
        if foreign := [type(action).__name__ for action in self.memory if action.unets_only]:
            reason = "is for UNets with these settings, and task=vae_decoder has none; set 'memory=[sdpa]'"
            raise UserError(f"memory: {foreign[0]} {reason}")

    def refuse(self, index: Index) -> None:
        refuse_other_tasks(self.evals, "vae_decoder", "'evals=[reconstruction]'")
        refuse_without_pictures(index.items, "task=vae_decoder", "data=sample, or task=text_to_image")
        self._looked_at(index)

    def load(self, model: Callable[[], Any]) -> nn.Module:
        self.vae: Any = trainable_autoencoder(model().vae, latent_noise=self.latent_noise)
        for name, parameter in self.vae.named_parameters():
            decodes = name.startswith(("decoder.", "post_quant_conv."))
            parameter.requires_grad_(decodes or self.trained == "all")
        network: nn.Module = self.vae
        return network

    def prepare(self, index: Index, cache: Any, strategy: Strategy, run: RunDirectory) -> Pictures:
        """Leave out what cannot be read. Nothing is encoded beforehand: batches read the pictures themselves."""
        looked_at = self._looked_at(index)
        share = chain(index.items[strategy.rank :: strategy.world], looked_at[strategy.rank :: strategy.world])
        found: list[tuple[Path, str]] = []
        with ThreadPoolExecutor(4) as pool:
            while some := list(islice(share, TOGETHER)):
                activity.beat()
                found += [(item.path, why) for item, why in zip(some, pool.map(unreadable, some), strict=True) if why]
        bad = dict(strategy.gather_objects(found))
        index = index.without(bad)
        refuse_empty(index, "data")
        held = [item for item in looked_at if item.path not in bad]
        bucketing = self.bucketing.merged(index.items.sizes, self.run.chunk_size(strategy.world))
        return Pictures(index, bucketing, self.zoom, self.recolour, held, self.run, strategy.world)

    def _looked_at(self, index: Index) -> list[Item]:
        """The held-out images that evaluators look at."""
        return list(dict.fromkeys(item for e in self.evals for item in e.held_out(index.held_out)))

    def loss(self, module: nn.Module, batch: PixelBatch) -> Losses:
        painted, latents = module(batch.pixels, batch.noise)
        values = (painted - batch.pixels).square().mean((1, 2, 3))
        if self.channel_pull:
            centre, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
            values = values + self.channel_pull * (centre.square() + (deviation - 1).square()).mean()
        return Losses(values, torch.zeros_like(values))

    def traced(self, data: Pictures, sample: Sample, seed: int) -> Traced:
        return Traced(str(data.index.items[sample.item].path), "")

    def free_groups(self, device: torch.device) -> list[dict[str, Any]]:
        return []

    def stateful(self) -> Mapping[str, Stateful]:
        return {}

    def flops(self, data: Pictures) -> None:
        """Not counted."""

    def studio(self, data: Pictures, state: State, tracker: Tracker, run: RunDirectory) -> AutoencoderStudio:
        return AutoencoderStudio(
            vae=self.vae,
            ema=state.ema,
            tracker=tracker,
            items=data.held_out or data.index.items,
            bucketing=data.bucketing,
            run_dir=run.path,
        )

    def described(self) -> Mapping[str, str]:
        moving = sum(p.numel() for p in self.vae.parameters() if p.requires_grad)
        device = next(self.vae.parameters()).device
        every = sum(p.numel() for p in self.vae.parameters())
        return {"autoencoder": f"{moving:,} of {every:,} parameters on {device}"}

    def remarks(self) -> Iterable[str]:
        return ()

    def figure(self, choices: Mapping[str, str]) -> Image.Image | None:
        return None

    def deliver(self, data: Pictures, weights: Mapping[str, Tensor], folder: Path) -> None:
        save_autoencoder(self.vae, weights, folder)

    @property
    def delivered(self) -> str:
        return "diffusers: AutoencoderKL.from_pretrained(..., subfolder='vae')"


@dataclass(frozen=True)
class Pictures:
    """Pictures and how a sample is drawn from them."""

    index: Index
    bucketing: Bucketing
    zoom: float
    recolour: bool
    held_out: Sequence[Item]
    run: RunSettings
    world: int

    @cached_property
    def _assigned(self) -> Assigned:
        return assigned(self.index.items.sizes, self.bucketing)

    def batches(self, settings: RunSettings, strategy: Strategy, *, start: int) -> DataLoader[PixelBatch]:
        sampler = RankBatches(
            self._plan(settings, strategy.world),
            start=start * settings.images_per_step(strategy.world),
            batch_size=settings.batch_size,
            rank=strategy.rank,
            world=strategy.world,
        )
        dataset = PixelDataset(self.index, self.bucketing, settings.seed, zoom=self.zoom, recolour=self.recolour)
        return whole_batches(dataset, sampler, workers=settings.workers)

    def _plan(self, settings: RunSettings, world: int) -> EpochPlan:
        buckets = by_bucket(self._assigned.of)
        return EpochPlan(buckets, settings.seed, settings.chunk_size(world))

    @cached_property
    def _report(self) -> Report:
        return report(self.bucketing, self.index.items.sizes)

    def one_of_each_shape(self, size: int) -> Iterator[PixelBatch]:
        generator = torch.Generator().manual_seed(0)
        for width, height in self._assigned.buckets:
            pixels = torch.randn(size, 3, height, width, generator=generator).clamp(-1, 1)
            noise = torch.randn(size, 4, height // 8, width // 8, generator=generator)
            yield PixelBatch(pixels, noise, torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64))

    def described(self) -> Mapping[str, str]:
        count = len(self.index.items)
        positions = self.run.steps(count, self.world) * self.run.images_per_step(self.world)
        missed = unseen(self._plan(self.run, self.world), positions, merges=self.bucketing.merge_small)
        return {"images": f"{count}{self.index.skipped.in_words()}", **self._report.rows(), **dict(missed)}

    def figure(self) -> Image.Image:
        return canvas_figure.canvases(self._report, len(self.index.skipped.of_images()))

    def counted(self) -> str:
        return "nothing, this task reads the pictures themselves"

    def write(self, run: RunDirectory) -> None:
        self.index.skipped.write(run.skipped)
        run.claim_data(self.index.fingerprint(), len(self.index.items))
