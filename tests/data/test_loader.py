"""Batches: the same samples for any number of processes, workers and interruptions."""

import multiprocessing
import signal
import subprocess
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nai_xl.data import loader
from nai_xl.data.bucketing import Canvases
from nai_xl.data.cache import MemoryCache
from nai_xl.data.captions import Captions, PlainCaptions
from nai_xl.data.epoch_plan import EpochPlan, by_bucket, numbered
from nai_xl.data.index import Index
from nai_xl.data.keys import TextKeys
from nai_xl.data.loader import Encoded, Placed, PositionDataset, RankBatches, batches
from nai_xl.data.noise import TrainingNoise
from nai_xl.data.rows import Item
from nai_xl.errors import UserError
from nai_xl.interfaces import Batch, Bucket, Placement
from nai_xl.rng import draws, generator
from tests.conftest import joined

WIDE, TALL = Bucket(48, 32), Bucket(32, 48)
MEAN, STD = torch.tensor([1.0, -2.0, 0.5, 3.0]).view(4, 1, 1), torch.tensor([2.0, 0.5, 4.0, 1.0]).view(4, 1, 1)


class ByTurns(Canvases):
    """Canvases of images that are 100, 101, ... pixels wide."""

    def buckets_of(self, sizes: NDArray[np.int32]) -> NDArray[np.uint16]:
        return (sizes[:, 0] % 2).astype(np.uint16)

    def assign(self, width: int, height: int) -> Bucket:
        return TALL if width % 2 else WIDE

    def placements(self, width: int, height: int) -> list[Placement]:
        return [Placement(self.assign(width, height), (60, 60), (crop, 0), flip=False) for crop in (0, 8)]


def encoded(count: int = 10) -> Encoded:
    """Images that are wide and tall by turns, two placements each, cached as random tensors."""
    generator = torch.Generator().manual_seed(0)
    cache = MemoryCache()
    items, texts = [], TextKeys("made by this test")
    cache.put(texts(""), {"context": torch.zeros(77, 6), "pooled": torch.zeros(3)})
    for i in range(count):
        bucket = TALL if i % 2 else WIDE
        items.append(Item(Path(f"{i}.png"), f"caption {i}", (100 + i, 90), f"{i:064x}"))
        cache.put(texts(f"caption {i}"), {"context": torch.full((77, 6), i + 1.0), "pooled": torch.full((3,), i + 1.0)})
        for crop in (0, 8):
            latents = torch.randn(4, bucket.height // 8, bucket.width // 8, generator=generator)
            cache.put(f"latent {i} {crop}", {"latents": latents})
    index = Index(items)
    placed = Placed(
        index.items, ByTurns([(WIDE, TALL)]), lambda content, place: f"latent {int(content, 16)} {place.crop[0]}"
    )
    return Encoded(index, placed, texts, cache, MEAN, STD, torch.arange(1.0, count + 1))


def plan(data: Encoded, chunk: int, seed: int = 3) -> EpochPlan:
    return EpochPlan(by_bucket(numbered([row[0].placement.bucket for row in data.latents])), seed, chunk)


def take(count: int, *, start: int = 0, batch_size: int = 2, workers: int = 0, chunk: int = 4) -> list[Batch]:
    data = encoded()
    sampler = RankBatches(plan(data, chunk), start=start, batch_size=batch_size, rank=0, world=1)
    return list(islice(batches(data, PlainCaptions(0.3), sampler, workers=workers), count))


def assert_same(found: Batch, expected: Batch) -> None:
    for field in fields(Batch):
        here, there = getattr(found, field.name), getattr(expected, field.name)
        assert here.dtype == there.dtype and torch.equal(here, there), field.name


@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (1, 2), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2)])
def test_all_ranks_together_train_the_same_samples_in_the_same_order(world: int, batch_size: int) -> None:
    p = plan(encoded(), chunk=8)
    expected = [(first + k, int(i)) for first, items in islice(p.from_position(0), 6) for k, i in enumerate(items)]
    ranks = [iter(RankBatches(p, start=0, batch_size=batch_size, rank=r, world=world)) for r in range(world)]
    found = [pair for _ in range(48 // (batch_size * world)) for rank in ranks for pair in next(rank)]
    assert found == expected


def test_every_batch_is_of_one_shape_and_its_fields_belong_together() -> None:
    data = encoded()
    for batch in take(20):
        assert len(batch) == 2
        assert batch.noise.shape == batch.latents.shape
        assert len(set((batch.item % 2).tolist())) == 1
        target = (batch.time_ids[:, 4] / 8, batch.time_ids[:, 5] / 8)
        assert all(side.tolist() == [size] * 2 for side, size in zip(target, batch.latents.shape[2:], strict=True))
        assert batch.time_ids[:, 1].tolist() == [100 + i for i in batch.item.tolist()]
        assert torch.equal(batch.weight, data.weights[batch.item])
        for row, i in enumerate(batch.item.tolist()):
            assert batch.context[row, 0, 0] in (0, i + 1)
            assert batch.pooled[row, 0] == batch.context[row, 0, 0]


def test_latents_are_normalised_by_mean_and_deviation() -> None:
    data = encoded()
    for batch in take(6):
        for row, i in enumerate(batch.item.tolist()):
            crop = int(batch.time_ids[row, 3])
            raw = data.cache.get(f"latent {i} {crop}")
            assert raw is not None
            torch.testing.assert_close(batch.latents[row] * STD + MEAN, raw["latents"])


def test_worker_processes_change_not_a_bit() -> None:
    for found, expected in zip(take(8, workers=2), take(8), strict=True):
        assert_same(found, expected)


def test_workers_outlast_signals_to_all_processes_and_end_with_their_loader() -> None:
    data = encoded()
    sampler = RankBatches(plan(data, 4), start=0, batch_size=2, rank=0, world=1)
    read = iter(batches(data, PlainCaptions(0.3), sampler, workers=1))
    found = [next(read)]
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        subprocess.run(["kill", f"-{number.value}", f"{worker.pid}"], check=True)
    found += islice(read, 7)
    for one, expected in zip(found, take(8), strict=True):
        assert_same(one, expected)
    worker.terminate()  # as a loader does when it is left
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("done", [2, 4, 6, 22])
def test_resumed_run_gets_the_batches_that_the_whole_run_would_have_got(done: int) -> None:
    whole = take(done // 2 + 5)
    for found, expected in zip(take(5, start=done), whole[done // 2 :], strict=True):
        assert_same(found, expected)


def test_micro_batch_size_changes_no_sample() -> None:
    small, large = take(16, batch_size=1), take(4, batch_size=4)
    for field in fields(Batch):
        parts = [torch.cat([getattr(b, field.name) for b in small[i : i + 4]]) for i in range(0, 16, 4)]
        assert all(torch.equal(a, getattr(b, field.name)) for a, b in zip(parts, large, strict=True)), field.name


def one_by_one(data: Encoded, captions: Captions, noise: TrainingNoise, strata: int | None, at: int) -> Batch:
    """Position `at` of seed 1, image at % 5 * 2, by the definitions of every field."""
    draw, number = draws(1, at), at % 5 * 2
    item, refs = data.index.items[number], data.latents[number]
    ref = refs[draw.choice("placement", len(refs))]
    raw, text = data.cache.get(ref.key), data.cache.get(data.texts(captions.pick(item.captions, draw)))
    assert raw is not None and text is not None
    latents = (raw["latents"].float() - data.mean) / data.std

    def normal(shape: tuple[int, ...], purpose: str) -> Tensor:
        return torch.randn(shape, generator=generator(1, at, purpose))

    shape = tuple(latents.shape)
    drawn = normal(shape, "noise")
    if noise.offset:
        drawn = drawn + noise.offset * normal((4, 1, 1), "noise offset")
    return Batch(
        latents=latents[None],
        context=text["context"][None],
        pooled=text["pooled"][None],
        time_ids=torch.tensor([ref.placement.time_ids(item.size)]),
        weight=data.weights[number : number + 1],
        position=torch.tensor([at]),
        item=torch.tensor([number]),
        u=torch.tensor([draw.stratified_u(strata) if strata else draw.u], dtype=torch.float64),
        noise=drawn[None],
        perturbation=(
            noise.perturbation * normal(shape, "input perturbation")[None]
            if noise.perturbation
            else torch.zeros(1, 1, 1, 1)
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strata", [None, 4])
@pytest.mark.parametrize("noise", [TrainingNoise(), TrainingNoise(0.1, 0.2)], ids=["plain", "offset and perturbation"])
def test_a_batch_made_at_once_equals_its_samples_made_one_by_one(
    noise: TrainingNoise, strata: int | None, dtype: torch.dtype
) -> None:
    data, captions = encoded(), PlainCaptions(0.5)
    assert isinstance(data.cache, MemoryCache)
    for entry in data.cache.entries.values():
        entry.update({name: tensor.to(dtype) for name, tensor in entry.items()})
    positions = [3, 4, 10, 11, 12, 13, 2**40]
    expected = joined([one_by_one(data, captions, noise, strata, position) for position in positions])
    dataset = PositionDataset(data, captions, 1, strata=strata, noise=noise)
    assert_same(dataset.__getitems__([(p, p % 5 * 2) for p in positions]), expected)
    assert_same(joined([dataset[p, p % 5 * 2] for p in positions]), expected)


def test_making_batches_leaves_the_cache_as_it_is() -> None:
    data, again = encoded(), encoded()
    batch = PositionDataset(data, PlainCaptions(0.0), 1).__getitems__([(0, 0), (1, 2)])
    for field in fields(Batch):
        getattr(batch, field.name).zero_()
    assert isinstance(data.cache, MemoryCache) and isinstance(again.cache, MemoryCache)
    for key, tensors in again.cache.entries.items():
        assert all(torch.equal(data.cache.entries[key][name], tensor) for name, tensor in tensors.items())
    assert torch.equal(data.weights, again.weights)


@pytest.mark.parametrize("recent", [0, 1, 3, 64])
def test_recent_captions_are_read_once_and_the_longest_unused_one_goes(
    recent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "RECENT", recent)
    data, read = encoded(), []
    get = MemoryCache.get
    monkeypatch.setattr(MemoryCache, "get", lambda cache, key: (read.append(key), get(cache, key))[1])
    dataset = PositionDataset(data, PlainCaptions(0.0), seed=0)
    kept: list[int] = []
    for number in [0, 0, 2, 4, 0, 2, 6, 8, 0, 0, 4]:
        read.clear()
        sample = dataset[(0, number)]
        assert torch.equal(sample.context, torch.full((1, 77, 6), number + 1.0))
        assert data.texts is not None and (data.texts(f"caption {number}") in read) == (number not in kept)
        kept = [*(other for other in kept if other != number), number][-recent:] if recent else []


def test_sample_depends_on_its_position_and_seed_alone() -> None:
    data = encoded()
    first, again = (PositionDataset(data, PlainCaptions(0.0), seed=1)[17, 4] for _ in range(2))
    assert_same(first, again)
    later, other = (
        PositionDataset(data, PlainCaptions(0.0), 1)[18, 4],
        PositionDataset(data, PlainCaptions(0.0), 2)[17, 4],
    )
    for different in (later, other):
        assert not torch.equal(first.noise, different.noise)
        assert not torch.equal(first.u, different.u)


def test_both_placements_of_an_image_come_up_equally_often() -> None:
    dataset = PositionDataset(encoded(), PlainCaptions(0.0), seed=0)
    left = torch.cat([dataset[position, 2].time_ids[:, 3] for position in range(400)])
    assert set(left.tolist()) == {0.0, 8.0}
    assert abs((left == 8).float().mean().item() - 0.5) < 0.1


def test_one_image_is_seen_with_and_without_its_caption() -> None:
    dataset = PositionDataset(encoded(), PlainCaptions(0.5), seed=0)
    heard = [dataset[position, 2].pooled[0, 0].item() for position in range(100)]
    assert set(heard) == {0.0, 3.0}
    assert 30 < heard.count(0.0) < 70


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_their_rate_and_independently_of_the_timestep(dropout: float) -> None:
    captions = PlainCaptions(dropout)
    dropped = np.array([captions.pick(("a cat",), draws(0, position)) == "" for position in range(20_000)])
    assert abs(dropped.mean() - dropout) <= 4 * (dropout * (1 - dropout) / 20_000) ** 0.5
    assert set(captions.texts(("a cat",)) or []) == {"a cat", ""}
    if 0 < dropout < 1:
        u = np.array([draws(0, position).u for position in range(20_000)])
        assert abs(np.corrcoef(u, dropped)[0, 1]) < 0.03


@pytest.mark.parametrize("dropout", [-0.1, 1.1])
def test_impossible_dropout_is_refused(dropout: float) -> None:
    with pytest.raises(UserError, match=r"captions\.dropout"):
        PlainCaptions(dropout)


def test_vanished_cache_entry_is_told_to_the_user() -> None:
    data = encoded()
    assert isinstance(data.cache, MemoryCache)
    data.cache.entries.clear()
    with pytest.raises(UserError, match="run the same command again"):
        PositionDataset(data, PlainCaptions(), seed=0)[0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_timestep_draws_can_be_spread_evenly_over_each_block_of_positions(workers: int) -> None:
    data = encoded()
    sampler = RankBatches(plan(data, chunk=2), start=0, batch_size=2, rank=0, world=1)
    loader = batches(data, PlainCaptions(0.0), sampler, workers=workers, strata=4)
    u = torch.cat([batch.u for batch in islice(loader, 6)])
    assert (u.view(3, 4) * 4).long().sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 3
    assert u.tolist() == [draws(3, position).stratified_u(4) for position in range(12)]
