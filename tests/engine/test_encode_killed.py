"""Two processes that fill a cache together, killed at moments of chance and begun anew."""

import multiprocessing
import os
import random
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch.distributed import FileStore

from nai_xl import config
from nai_xl.data.cache import DiskCache, MemoryCache
from nai_xl.data.index import Index
from nai_xl.data.loader import read
from nai_xl.data.placement_table import PlacementTable
from nai_xl.distributed.team import StoreTeam
from nai_xl.engine import encode
from nai_xl.engine.encode import Encoder

IMAGES, KILLS, WORLD = 60, 3, 2


def pictures(folder: Path) -> Index:
    draw = np.random.default_rng(0)
    folder.mkdir()
    for number in range(IMAGES):
        width, height = [(64, 64), (96, 64), (64, 96)][number % 3]
        coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    scanned: Index = config.build(config.compose(["data=folder", f"data.dir={folder}"]).data).scan()
    return scanned


def test_a_cache_that_was_killed_while_it_grew_ends_equal_entry_for_entry_to_an_undisturbed_one(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(encode, "TOGETHER", 2)
    monkeypatch.setattr("nai_xl.data.shards.shard.FULL", 10_000)
    monkeypatch.setattr("nai_xl.data.cache.FULL", 10_000)
    index = pictures(tmp_path / "images")
    cfg = config.compose(["bucketing.resolution=64"])
    components, bucketing, text = (config.build(cfg[group]) for group in ("model", "bucketing", "text"))
    captions = [item.caption for item in index.items]

    def fill(encoder: Encoder) -> list[str]:
        refs = encoder.latent_refs(index, bucketing)
        assert encoder.encode_images([refs]) == {}
        texts = encoder.encode_captions(lambda: captions, text.chunks)
        return [ref.key for row in refs for ref in row] + [*map(texts, ["", *captions])]

    whole = Encoder(components, MemoryCache(), "fp32", torch.device("cpu"))
    keys = fill(whole)
    latents = PlacementTable.of([whole.latent_refs(index, bucketing)]).keys(whole._latents_made_by)

    def rank(number: int, store: Path) -> None:
        team = StoreTeam(FileStore(str(store), WORLD), number, WORLD)
        fill(Encoder(components, DiskCache(tmp_path / "cache"), "fp32", torch.device("cpu"), team=team))

    def begun(attempt: int) -> list[Any]:
        context = multiprocessing.get_context("fork")
        store = tmp_path / f"store{attempt}"
        ranks = [context.Process(target=rank, args=(number, store)) for number in range(WORLD)]
        for process in ranks:
            process.start()
        return ranks

    draw, there = random.Random(0), 0
    for attempt in range(KILLS):
        ranks = begun(attempt)
        wanted = there + draw.randrange(1, IMAGES // KILLS - 4)
        until = time.monotonic() + timedelta(minutes=1).total_seconds()
        while there < wanted and time.monotonic() < until:
            time.sleep(draw.random() * 0.01)
            there = int((~DiskCache(tmp_path / "cache").missing(latents)).sum())
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
        assert [process.join() or process.exitcode for process in ranks] == [-signal.SIGKILL] * WORLD
    assert KILLS <= there < IMAGES
    for process in begun(KILLS):
        process.join(60)
        assert process.exitcode == 0
    cache = DiskCache(tmp_path / "cache")
    for key in keys:
        one, other = read(cache, key), read(whole.cache, key)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not list(tmp_path.rglob("*.open")) and not list(tmp_path.rglob("*.dead"))
    rows = 0
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            rows += sum(len(file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    assert rows == len(set(keys))  # none was made twice
