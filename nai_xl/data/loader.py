"""From the plan to batches: a data set of (position, item) pairs, read in workers with their random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from nai_xl.data.captions import PlainCaptions
from nai_xl.data.index import Index, Item
from nai_xl.data.noise import TrainingNoise
from nai_xl.data.plan import Plan
from nai_xl.errors import UserError
from nai_xl.rng import draws
from nai_xl.types import Batch, Cache, Placement


@dataclass(frozen=True)
class LatentRef:
    """Where one encoded placement of an image lies in the cache."""

    key: str
    placement: Placement


@dataclass(frozen=True)
class Encoded:
    """What training reads: the index, and the cache keys of every image's placements and of every text."""

    index: Index
    latents: Sequence[Sequence[LatentRef]]  # one row an item
    texts: dict[str, str]  # text -> key
    cache: Cache
    mean: torch.Tensor  # [4,1,1] of the raw latents
    std: torch.Tensor  # [4,1,1]
    weights: torch.Tensor  # [N] sample weights
    held_out: Sequence[tuple[Item, LatentRef]] = ()  # images that are never trained on, one placement of each

    def condition(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """context [77k,D] and pooled [P] of a text that was encoded beforehand."""
        tensors = self.read(self.texts[text])
        return tensors["context"], tensors["pooled"]

    def latents_of(self, ref: LatentRef) -> torch.Tensor:
        """[4,h,w] float32, normalised, of one placement of an image."""
        return (self.read(ref.key)["latents"].float() - self.mean) / self.std

    def read(self, key: str) -> dict[str, torch.Tensor]:
        return read(self.cache, key)


def read(cache: Cache, key: str) -> dict[str, torch.Tensor]:
    """An entry that was made beforehand. Raises UserError if it has gone since."""
    tensors = cache.get(key)
    if tensors is None:
        raise UserError(f"cache entry {key} has gone or is damaged; run the same command again to make it anew")
    return tensors


class PositionDataset(Dataset[Batch]):
    """(position, item) -> a Batch of one sample, whatever worker or rank asks.

    With `strata`, the timestep draws of each block of as many positions are spread evenly (Draws.stratified_u).
    """

    def __init__(
        self,
        encoded: Encoded,
        captions: PlainCaptions,
        seed: int,
        *,
        strata: int | None = None,
        noise: TrainingNoise | None = None,
    ):
        self.encoded, self.captions, self.seed, self.strata = encoded, captions, seed, strata
        self.noise = noise or TrainingNoise()

    def __getitem__(self, where: tuple[int, int]) -> Batch:
        position, number = where
        draw = draws(self.seed, position)
        item = self.encoded.index.items[number]
        refs = self.encoded.latents[number]
        ref = refs[draw.choice("placement", len(refs))]
        context, pooled = self.encoded.condition(self.captions.pick(item.caption, draw))
        u = draw.stratified_u(self.strata) if self.strata else draw.u
        raw = self.encoded.read(ref.key)["latents"].float()
        latents = (raw - self.encoded.mean) / self.encoded.std
        noise, perturbation = self.noise(draw, latents.shape)
        return Batch(
            latents=latents[None],
            context=context[None],
            pooled=pooled[None],
            time_ids=torch.tensor([ref.placement.time_ids(item.size)]),
            weight=self.encoded.weights[number : number + 1],
            position=torch.tensor([position]),
            item=torch.tensor([number]),
            u=torch.tensor([u], dtype=torch.float64),
            noise=noise[None],
            perturbation=perturbation[None],
        )


def collate(samples: list[Batch]) -> Batch:
    """One Batch of all samples, which share a bucket and so every shape."""
    return Batch(**{name: torch.cat([getattr(s, name) for s in samples]) for name in Batch.__dataclass_fields__})


class RankBatches:
    """Endless lists of (position, item): this rank's micro-batches from `start` on.

    A chunk is cut into global micro-batches of batch_size x world; rank r takes its r-th batch_size of each.
    """

    def __init__(self, plan: Plan, *, start: int, batch_size: int, rank: int, world: int):
        self.plan, self.start, self.batch_size, self.rank, self.world = plan, start, batch_size, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        wide = self.batch_size * self.world
        aligned = self.start - self.start % self.plan.chunk
        for first, items in self.plan.from_position(aligned):
            for offset in range(0, self.plan.chunk, wide):
                if first + offset < self.start:
                    continue
                mine = range(offset + self.rank * self.batch_size, offset + (self.rank + 1) * self.batch_size)
                yield [(first + i, int(items[i])) for i in mine]


def batches(
    encoded: Encoded,
    captions: PlainCaptions,
    sampler: RankBatches,
    *,
    workers: int,
    strata: int | None = None,
    noise: TrainingNoise | None = None,
) -> DataLoader[Batch]:
    """The loader of one rank. `workers` processes read ahead; 0 reads in the training process."""
    return DataLoader(
        PositionDataset(encoded, captions, sampler.plan.seed, strata=strata, noise=noise),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
