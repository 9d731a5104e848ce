"""One process of benchmarks/data.py, for an index file of this version:

python benchmarks/data_now.py fill|times|memory|reading INDEX CACHE
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_made import BATCH, CHUNK, READ, READ_SMALL, RECIPE, SMALL, middle, read_first, sparse_shards
from resources import MIB, Peak, Times, each, rate, settled, tell, worker_growth

from nai_xl.data.bucketing import AspectBuckets
from nai_xl.data.cache import DiskCache
from nai_xl.data.captions import PlainCaptions
from nai_xl.data.epoch_plan import EpochPlan, by_bucket
from nai_xl.data.index import Index
from nai_xl.data.keys import TextKeys, latent_key, recipe
from nai_xl.data.loader import Encoded, Placed, RankBatches, batches
from nai_xl.data.placement_table import PlacementTable
from nai_xl.data.rows import Rows
from nai_xl.data.sample_weights import equal

MADE_BY = recipe(RECIPE)
TEXTS = TextKeys(RECIPE)


def opened(file: Path) -> Index:
    return Index(Rows.mapped(file))


def placed(index: Index, resolution: int = 1024) -> Placed:
    return Placed(index.items, AspectBuckets(resolution), partial(latent_key, made_by=MADE_BY))


def keys(latents: Placed) -> Any:
    return PlacementTable.of([latents]).keys(MADE_BY)


def sampler(latents: Placed, start: int) -> RankBatches:
    plan = EpochPlan(by_bucket(latents.assigned.of), seed=0, chunk=CHUNK)
    return RankBatches(plan, start=start, batch_size=BATCH, rank=0, world=1)


def fill(file: Path, folder: Path) -> None:
    """A cache that has all keys, and whole entries of those images that are read."""
    index = opened(file)
    latents, draw = placed(index), torch.Generator().manual_seed(0)
    whole = read_first(sampler, latents, READ)
    there = np.ones(len(index.items), bool)
    there[whole] = False
    sparse_shards(folder / "cache" / "shards", keys(latents)[there])
    cache = DiskCache(folder / "cache")
    with cache.alone("benchmark"):
        _put(cache, latents, whole, draw)
        for number in whole:
            caption = index.items[number].caption
            tensors = {"context": torch.randn(77, 2048, generator=draw), "pooled": torch.randn(1280, generator=draw)}
            cache.put(TEXTS(caption), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    small, cache = placed(index, SMALL), DiskCache(folder / "small")
    with cache.alone("benchmark"):
        _put(cache, small, read_first(sampler, small, READ_SMALL), draw)
        cache.put(TEXTS(""), {"context": torch.randn(77, 32), "pooled": torch.randn(32)})
    os.sync()  # pages of a mapped file that wait for the disk would count as written by who looks at them


def _put(cache: DiskCache, latents: Placed, numbers: list[int], draw: torch.Generator) -> None:
    for number in numbers:
        (ref,) = latents[number]
        width, height = ref.placement.bucket
        cache.put(ref.key, {"latents": torch.randn(4, height // 8, width // 8, generator=draw).bfloat16()})


def encoded(index: Index, latents: Placed, cache: DiskCache) -> Encoded:
    return Encoded(index, latents, TEXTS, cache, torch.zeros(4, 1, 1), torch.ones(4, 1, 1), equal(index))


def read_ahead(data: Encoded, dropout: float, workers: int) -> Iterator[Any]:
    """Batches from the middle of the third epoch on."""
    chosen = sampler(data.latents, middle(len(data.latents)))
    return iter(batches(data, PlainCaptions(dropout), chosen, workers=workers))


def times(file: Path, folder: Path) -> dict[str, float]:
    """Each part of a start as it comes, in a process of its own."""
    clock = Times()
    index = clock.once("open", lambda: opened(file))
    clock.median("hold out", lambda: index.hold_out(0.01))
    clock.median("buckets", lambda: placed(index).assigned)
    latents = placed(index)
    found = clock.median("keys", lambda: keys(latents))
    clock.median("look up", lambda: DiskCache(folder / "cache").missing(found))
    clock.median("weights", lambda: equal(index))
    clock.once("fingerprint", index.fingerprint)
    clock.median("fingerprint noted", index.fingerprint)
    latents.assigned  # noqa: B018 - counted above
    clock.median("plan", lambda: next(iter(sampler(latents, 0))))
    clock.median("resume", lambda: next(iter(sampler(latents, middle(len(latents))))))
    return clock.found


def memory(file: Path, folder: Path) -> dict[str, float]:
    """What a run keeps, and what reading adds to a worker."""
    torch.set_num_threads(1)
    start_up(file, folder)  # libraries load what they need
    before, peak = settled(), Peak()
    kept = start_up(file, folder)
    used, most = settled() - before, peak.bytes
    whole = opened(file)
    data = encoded(whole, placed(whole, SMALL), DiskCache(folder / "small"))
    early, late = READ_SMALL // BATCH // 4, READ_SMALL // BATCH - 16
    worker, grown = worker_growth(read_ahead(data, 1.0, 2), early, late)
    items = len(kept[0].items)
    return {
        "private": used.private / items,
        "rss": used.rss / items,
        "private MiB": used.private / MIB,
        "peak MiB": most / MIB,
        "worker MiB": worker.private / MIB,
        "worker a read": 2 * grown.private / ((late - early) * BATCH),
    }


def start_up(file: Path, folder: Path) -> tuple[Any, ...]:
    index = opened(file).hold_out(0.01)
    latents, cache = placed(index), DiskCache(folder / "cache")
    assert not cache.missing(keys(latents)).any()
    index.fingerprint()
    batches = iter(sampler(latents, middle(len(latents))))
    next(batches)
    return index, latents, cache, equal(index), batches


def reading(file: Path, folder: Path) -> dict[str, float]:
    """Entries whose files are in the page cache, at SDXL's size in bf16, and the loader's samples of them."""
    torch.set_num_threads(1)
    index, cache = opened(file), DiskCache(folder / "cache")
    latents = placed(index)
    numbers = read_first(sampler, latents, READ)
    texts = list(dict.fromkeys(TEXTS(index.items[n].caption) for n in numbers))
    data = encoded(index, latents, cache)
    found: dict[str, float] = {}
    for name, wanted in (("latent", [latents[n][0].key for n in numbers]), ("text", texts)):
        took = each(data.read, wanted, 5)
        found |= {f"{name} median": took[len(took) // 2], f"{name} p99": took[len(took) * 99 // 100]}
    for workers in (0, 2):
        read = rate(read_ahead(data, 0.0, workers), READ // BATCH - 16, 8)
        found[f"samples/s, {workers} workers"] = BATCH * read
    return found


if __name__ == "__main__":
    what, index_file, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    tell({"fill": fill, "times": times, "memory": memory, "reading": reading}[what](index_file, folder) or {})
