"""From the plan to batches: a data set of (position, item) pairs, read in workers with their random numbers."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, overload

import torch
from torch.utils.data import DataLoader, Dataset

from nai_xl.data.bucketing import BLOCK, Assigned, assigned
from nai_xl.data.captions import Captions
from nai_xl.data.epoch_plan import EpochPlan
from nai_xl.data.index import Index
from nai_xl.data.keys import TextKeys
from nai_xl.data.noise import TrainingNoise
from nai_xl.data.rows import Item, Rows
from nai_xl.errors import UserError
from nai_xl.interfaces import Batch, Bucketing, Cache, Placement
from nai_xl.rng import Draws, draws

T = TypeVar("T")
RECENT = 64  # captions whose conditions a reader keeps, 20 MB for SDXL


@dataclass(frozen=True)
class LatentRef:
    """Where one encoded placement of an image lies in the cache."""

    key: str
    placement: Placement


@dataclass(frozen=True)
class Placed(Sequence[Sequence[LatentRef]]):
    """Every placement of every image: one row an item, made when it is asked for.

    key: the cache key of an image's content, hexadecimal, on a placement.
    """

    rows: Rows
    bucketing: Bucketing
    key: Callable[[str, Placement], str]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> list[LatentRef]: ...
    @overload
    def __getitem__(self, number: slice) -> Placed: ...
    def __getitem__(self, number: int | slice) -> list[LatentRef] | Placed:
        if isinstance(number, slice):
            return Placed(self.rows[number], self.bucketing, self.key)
        return self._of(self.rows.value("content", number).hex(), self.rows.size(number))

    def of(self, item: Item) -> list[LatentRef]:
        """Those of an image, whether it is one of these or not."""
        return self._of(item.content, item.size)

    def _of(self, content: str, size: tuple[int, int]) -> list[LatentRef]:
        return [LatentRef(self.key(content, place), place) for place in self.bucketing.placements(*size)]

    def __iter__(self) -> Iterator[list[LatentRef]]:
        return map(self.of, self.rows)

    @cached_property
    def total(self) -> int:
        """How many placements there are."""
        sizes = self.rows.sizes
        blocks = (sizes[start : start + BLOCK] for start in range(0, len(sizes), BLOCK))
        return sum(int(self.bucketing.places(block).counts.sum()) for block in blocks)

    @cached_property
    def assigned(self) -> Assigned:
        """Which bucket each image's is."""
        return assigned(self.rows.sizes, self.bucketing)


@dataclass(frozen=True)
class Encoded:
    """What training reads: the index, and how the cache keys of placements and of texts are found."""

    index: Index
    latents: Placed
    texts: TextKeys | None  # None where the step encodes the text
    cache: Cache
    mean: torch.Tensor  # [4,1,1] of the raw latents
    std: torch.Tensor  # [4,1,1]
    weights: torch.Tensor  # [N] sample weights
    held_out: Sequence[tuple[Item, LatentRef]] = ()  # images that are never trained on, one placement of each

    def condition(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """context [77k,D] and pooled [P], float32, of a text that was encoded beforehand."""
        context, pooled = self.kept(text)
        return context.float(), pooled.float()

    def kept(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in the precision of the cache."""
        assert self.texts is not None
        tensors = self.read(self.texts(text), f"the text {shortened(text)}")
        return tensors["context"], tensors["pooled"]

    def latents_of(self, ref: LatentRef) -> torch.Tensor:
        """[4,h,w] float32, normalised, of one placement of an image."""
        return (self.read(ref.key)["latents"].float() - self.mean) / self.std

    def drawn(self, draw: Draws, number: int, captions: Captions) -> tuple[LatentRef, str]:
        """The placement and the text of a sample of item `number`."""
        row = self.latents[number]
        words = self.index.items.value("captions", number)
        return row[draw.choice("placement", len(row))], captions.pick(words, draw)

    def read_latents(self, number: int, ref: LatentRef) -> torch.Tensor:
        """[4,h,w] as they lie in the cache, of one placement of item `number`."""
        tensors = self.cache.get(ref.key)
        return (tensors or self.read(ref.key, self.index.items[number].path))["latents"]

    def read(self, key: str, of: object = "") -> dict[str, torch.Tensor]:
        return read(self.cache, key, of)


def read(cache: Cache, key: str, of: object = "") -> dict[str, torch.Tensor]:
    """An entry that was made beforehand, `of` a file or a text. Raises UserError if it has gone since."""
    tensors = cache.get(key)
    if tensors is None:
        what = f"the cached entry of {of}" if of else "a cached entry"
        raise UserError(
            f"{what} has gone or is damaged: {cache.place(key)}; run the same command again, which makes it anew and "
            "goes on from the last checkpoint"
        )
    return tensors


def not_finite(cache: Cache, key: str, of: object) -> str | None:
    """What is wrong with an entry that is there and holds numbers that are not finite, and its cure."""
    tensors = cache.get(key) or {}
    if all(tensor.isfinite().all() for tensor in tensors.values()):
        return None
    return (
        f"The cached entry of {of} is not finite ({cache.place(key)}): python -m nai_xl.precompute --verify with the "
        "same overrides discards it, and the same command then makes it anew and goes on."
    )


class PositionDataset(Dataset[Batch]):
    """(position, item) -> a Batch of one sample, whatever worker or rank asks.

    With `strata`, the timestep draws of each block of as many positions are spread evenly (Draws.stratified_u).
    tokens: the fields of a Batch that stand for texts which the step encodes; None where they lie encoded in the cache.
    """

    def __init__(
        self,
        encoded: Encoded,
        captions: Captions,
        seed: int,
        *,
        strata: int | None = None,
        noise: TrainingNoise | None = None,
        tokens: Callable[[Sequence[str]], dict[str, torch.Tensor]] | None = None,
    ):
        self.encoded, self.captions, self.seed, self.strata = encoded, captions, seed, strata
        self.noise = noise or TrainingNoise()
        self._told = tokens or self._conditions
        self._recent: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __getitem__(self, where: tuple[int, int]) -> Batch:
        """A Batch of one sample."""
        return self.__getitems__([where])

    def __getitems__(self, where: Sequence[tuple[int, int]]) -> Batch:
        """The Batch of B samples that share a bucket, made at once: what the loader asks for.

        Raises UserError if a cache entry has gone.
        """
        encoded, sizes = self.encoded, self.encoded.index.items.size
        positions, numbers = zip(*where, strict=True)
        samples = [draws(self.seed, position) for position in positions]
        pairs = [encoded.drawn(draw, number, self.captions) for draw, number in zip(samples, numbers, strict=True)]
        refs = [ref for ref, _ in pairs]
        raw = torch.stack([encoded.read_latents(n, ref) for n, ref in zip(numbers, refs, strict=True)]).float()
        noise, perturbation = self.noise(samples, raw.shape[1:])
        return Batch(
            latents=(raw - encoded.mean) / encoded.std,
            **self._told([text for _, text in pairs]),
            time_ids=torch.tensor([ref.placement.time_ids(sizes(n)) for ref, n in zip(refs, numbers, strict=True)]),
            weight=encoded.weights[list(numbers)],
            position=torch.tensor(positions),
            item=torch.tensor(numbers),
            u=torch.tensor([d.stratified_u(self.strata) if self.strata else d.u for d in samples], dtype=torch.float64),
            noise=noise,
            perturbation=perturbation,
        )

    def _conditions(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        context, pooled = zip(*map(self._condition, texts), strict=True)
        none = torch.zeros(len(texts), 0, dtype=torch.int64)
        return {"context": torch.stack(context), "pooled": torch.stack(pooled), "chunks": none}

    def _condition(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Where captions are few, or often dropped, reading them takes as long as reading the images."""
        found = self._recent.pop(text, None) or self.encoded.kept(text)
        self._recent[text] = found  # the last one again
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        return found


def shortened(text: str) -> str:
    """A text in quotes, its beginning where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _as_it_is(batch: Any) -> Any:
    """In place of torch's joining of samples: the data set gives whole batches."""
    return batch


class RankBatches:
    """Endless lists of (position, item): this rank's micro-batches from `start` on.

    A chunk is cut into global micro-batches of batch_size x world; rank r takes its r-th batch_size of each.
    """

    def __init__(self, plan: EpochPlan, *, start: int, batch_size: int, rank: int, world: int):
        self.plan, self.start, self.batch_size, self.rank, self.world = plan, start, batch_size, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        wide = self.batch_size * self.world
        skipped = self.start % self.plan.chunk
        for first, items in self.plan.from_position(self.start - skipped):
            for offset in range(-(-skipped // wide) * wide, self.plan.chunk, wide):
                begin = offset + self.rank * self.batch_size
                yield list(enumerate(items[begin : begin + self.batch_size].tolist(), start=first + begin))
            skipped = 0


def batches(
    encoded: Encoded,
    captions: Captions,
    sampler: RankBatches,
    *,
    workers: int,
    strata: int | None = None,
    noise: TrainingNoise | None = None,
    tokens: Callable[[Sequence[str]], dict[str, torch.Tensor]] | None = None,
) -> DataLoader[Batch]:
    """The micro-batches of encoded images and captions, of one rank; see whole_batches."""
    dataset = PositionDataset(encoded, captions, sampler.plan.seed, strata=strata, noise=noise, tokens=tokens)
    return whole_batches(dataset, sampler, workers=workers)


def whole_batches(dataset: Dataset[T], sampler: RankBatches, *, workers: int) -> DataLoader[T]:
    """The loader of one rank, for a data set that makes a whole micro-batch of each list of (position, item).

    `workers` processes read ahead; 0 reads in the training process.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_outlast_signals,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _outlast_signals(worker: int) -> None:
    """Called in a worker. A signal to all processes of a group or a job asks the training process to finish its step,
    and for that it needs its workers: they end when it ends them.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # others cannot tell who has sent a SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
