"""One process of benchmarks/data.py, for the version before: an index is a list of Items, a cache entry a file.

python benchmarks/data_before.py times|memory|reading INDEX FOLDER COUNT, with that version first in PYTHONPATH
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from data_made import BATCH, CHUNK, READ, READ_SMALL, RECIPE, SMALL, middle, read_first
from resources import MIB, Times, each, rate, settled, tell, worker_growth

index_module, loader, cache_module = (import_module(f"nai_xl.data.{name}") for name in ("index", "loader", "cache"))
epoch_plan, bucketing = (import_module(f"nai_xl.data.{name}") for name in ("epoch_plan", "bucketing"))
captions, sample_weights = (import_module(f"nai_xl.data.{name}") for name in ("captions", "sample_weights"))


def listed(file: Path) -> Any:
    """The same images as that version had them after it had looked at every file."""
    with pa.memory_map(str(file)) as source:
        rows = pa.ipc.open_file(source).read_all()
    columns = [rows[name].to_pylist() for name in ("path", "captions", "width", "height", "content")]
    return index_module.Index(
        [
            index_module.Item(Path(path.decode()), several[0], (width, height), content.hex())
            for path, several, width, height, content in zip(*columns, strict=True)
        ],
        [],
    )


def refs(index: Any, resolution: int = 1024) -> Any:
    """By that version's own lines, with a constant in place of the hash of the autoencoder's weights."""
    encoder = import_module("nai_xl.engine.encode").Encoder(None, None, "fp32", torch.device("cpu"))
    vars(encoder)["_vae"] = RECIPE
    return encoder.latent_refs(index, bucketing.AspectBuckets(resolution))


def text_keys(index: Any) -> dict[str, str]:
    return {item.caption: cache_module.content_key(RECIPE, item.caption) for item in index.items}


def sampler(rows: Any, start: int) -> Any:
    buckets = epoch_plan.by_bucket([row[0].placement.bucket for row in rows])
    plan = epoch_plan.EpochPlan(buckets, seed=0, chunk=CHUNK)
    return loader.RankBatches(plan, start=start, batch_size=BATCH, rank=0, world=1)


def encoded(index: Any, rows: Any, texts: dict[str, str], cache: Any) -> Any:
    zeros, ones = torch.zeros(4, 1, 1), torch.ones(4, 1, 1)
    return loader.Encoded(index, rows, texts, cache, zeros, ones, sample_weights.equal(index))


def read_ahead(data: Any, dropout: float, workers: int) -> Iterator[Any]:
    chosen = sampler(data.latents, middle(len(data.latents)))
    return iter(loader.batches(data, captions.PlainCaptions(dropout), chosen, workers=workers))


def put(cache: Any, rows: Any, numbers: list[int]) -> None:
    """Latents as that version keeps them, in float32."""
    for number in numbers:
        width, height = rows[number][0].placement.bucket
        cache.put(rows[number][0].key, {"latents": torch.randn(4, height // 8, width // 8)})


def times(file: Path, folder: Path) -> dict[str, float]:
    clock, index = Times(), listed(file)
    clock.median("hold out", lambda: index.hold_out(0.01))
    rows = clock.median("keys", lambda: refs(index))
    if len(rows) <= 10_000:  # as many files
        cache, small = cache_module.DiskCache(folder / "before"), {"latents": torch.zeros(4, 8, 8)}
        for row in rows:
            cache.put(row[0].key, small)
        clock.median("look up", lambda: [ref.key in cache for row in rows for ref in row])
    clock.median("weights", lambda: sample_weights.equal(index))
    clock.median("fingerprint", index.fingerprint)
    clock.median("plan", lambda: next(iter(sampler(rows, 0))))
    clock.median("resume", lambda: next(iter(sampler(rows, middle(len(rows))))))
    return clock.found


def memory(file: Path, folder: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    tiny = listed(file)
    refs(index_module.Index(tiny.items[:10], []))
    del tiny
    before = settled()
    index = listed(file).hold_out(0.01)
    rows, texts, weights = refs(index), text_keys(index), sample_weights.equal(index)
    batches = iter(sampler(rows, middle(len(rows))))
    next(batches)
    used = settled() - before
    small, cache = refs(index, SMALL), cache_module.DiskCache(folder / "before_small")
    put(cache, small, read_first(sampler, small, READ_SMALL))
    cache.put(RECIPE, {"context": torch.randn(77, 32), "pooled": torch.randn(32)})
    data = encoded(index, small, {"": RECIPE}, cache)
    early, late = READ_SMALL // BATCH // 4, READ_SMALL // BATCH - 16
    worker, grown = worker_growth(read_ahead(data, 1.0, 2), early, late)
    items = len(index.items)
    assert len(texts) and len(weights)
    return {
        "private": used.private / items,
        "rss": used.rss / items,
        "private MiB": used.private / MIB,
        "worker MiB": worker.private / MIB,
        "worker a read": 2 * grown.private / ((late - early) * BATCH),
    }


def reading(file: Path, folder: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    index, cache = listed(file), cache_module.DiskCache(folder / "before_large")
    rows, keys = refs(index), text_keys(index)
    numbers = read_first(sampler, rows, READ)
    put(cache, rows, numbers)
    texts = {index.items[n].caption: keys[index.items[n].caption] for n in numbers}
    for key in texts.values():
        cache.put(key, {"context": torch.randn(77, 2048), "pooled": torch.randn(1280)})
    data, found = encoded(index, rows, texts, cache), dict[str, float]()
    for name, wanted in (("latent", [rows[n][0].key for n in numbers]), ("text", [*texts.values()])):
        took = each(data.read, wanted, 5)
        found |= {f"{name} median": took[len(took) // 2], f"{name} p99": took[len(took) * 99 // 100]}
    for workers in (0, 2):
        read = rate(read_ahead(data, 0.0, workers), READ // BATCH - 16, 8)
        found[f"samples/s, {workers} workers"] = BATCH * read
    return found


if __name__ == "__main__":
    what, index_file, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    tell({"times": times, "memory": memory, "reading": reading}[what](index_file, folder))
