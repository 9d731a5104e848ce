"""What feeds the loop: encoding images and captions, reading a cached sample, the epoch plan, opening the index.

python benchmarks/cache.py                                  tiny model, this machine's CPU
python benchmarks/cache.py --size sdxl --device cuda --resolution 1024 --batch 1 4 8
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Row, Shapes, command, disk_cache, random_data, shapes, spread, write
from PIL import Image

from nai_xl import config
from nai_xl.data.captions import PlainCaptions
from nai_xl.data.epoch_plan import EpochPlan, by_bucket, numbered
from nai_xl.data.index import Index
from nai_xl.data.loader import PositionDataset
from nai_xl.data.source.folder import FolderSource
from nai_xl.engine.encode import Encoder
from nai_xl.interfaces import Bucket
from nai_xl.model.quiet import quiet_libraries
from nai_xl.model.sdxl.components import Components
from nai_xl.model.sdxl_random import sdxl_random
from nai_xl.model.text import encode_texts
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.model.vae import encode_pixels

NATIVE = {"tiny": 128, "sdxl": 1024}
SDXL = Shapes(1024, 2048, 1280)
MILLION = 1_000_000
BUCKETS = 17
MICRO = 1e6  # microseconds in a second


def timed(work: Callable[[], object], repeats: int, device: torch.device | None = None) -> dict[str, float]:
    """Seconds of one call: median, p10, p90, mean over `repeats` after two to warm up."""
    times = []
    for number in range(repeats + 2):
        began = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - began)
    return spread(times)


def images(parts: Components, resolution: int, batch: int, device: torch.device, repeats: int) -> Iterator[Row]:
    """The autoencoder's half that encodes, with and without autocast, as engine/encode calls it."""
    vae = parts.vae.to(device)
    pixels = torch.rand(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for precision in ("fp32", "bf16"):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = timed(lambda: encode_pixels(vae, pixels), repeats, device)
        what = f"VAE encode, {resolution} px, batch {batch}, {precision}"
        yield rate(what, batch, found, "images/s")


def captions(parts: Components, batch: int, device: torch.device, repeats: int) -> Row:
    """Both text encoders and both tokenizers."""
    encoders = [encoder.to(device) for encoder in parts.text_encoders]
    texts = [f"a picture of {number} things, standing side by side in the evening light" for number in range(batch)]
    found = timed(lambda: encode_texts(parts.tokenizers, encoders, texts, chunks=1), repeats, device)
    return rate(f"caption encode, batch {batch}", batch, found, "captions/s")


def rate(what: str, batch: int, found: dict[str, float], unit: str) -> Row:
    low, high = (f"{batch / found[key]:.3g}" for key in ("p90", "p10"))
    return {"what": what, "value": batch / found["median"], "unit": unit, "p10..p90": f"{low}..{high}"}


def duration(what: str, found: dict[str, float], unit: str, factor: float, target: float | None = None) -> Row:
    """`factor` turns seconds into `unit`; `target` is in that unit."""
    value = found["median"] * factor
    spread_ = f"{found['p10'] * factor:.3g}..{found['p90'] * factor:.3g}"
    row: Row = {"what": what, "value": value, "unit": unit, "p10..p90": spread_}
    return row if target is None else {**row, "target": target, "met": "yes" if value <= target else "no"}


def reading(shape: Shapes, label: str, samples: int, batch: int) -> Iterator[Row]:
    """One sample from the disk cache, its files in the page cache: reading alone, then all that the loader does."""
    with disk_cache() as (_, cache):
        data = random_data(shape, samples, cache)
        dataset = PositionDataset(data, PlainCaptions(), seed=0)
        place = itertools.count()

        def read() -> None:
            number = next(place) % samples
            data.read(data.latents[number][0].key)
            data.condition(data.index.items[number].caption)

        def sample() -> None:
            position = next(place)
            dataset[position, position % samples]

        where = [(position, position) for position in range(min(batch, samples))]
        yield duration(f"read a cached sample, {label}", timed(read, 10 * samples), "us", MICRO, 50)
        yield duration(f"one sample of the loader, {label}", timed(sample, 10 * samples), "us", MICRO)
        together = timed(lambda: dataset.__getitems__(where), 50)
        yield duration(f"a batch of {len(where)} from the loader, {label}", together, "us", MICRO)


def plan(count: int) -> Iterator[Row]:
    """Buckets as an aspect bucketing would leave them: a few large ones, many small."""
    draw = np.random.default_rng(0)
    sizes = [Bucket(64 * (8 + n), 64 * (24 - n)) for n in range(BUCKETS)]
    weights = 1 / (1 + np.arange(BUCKETS))
    buckets = [sizes[n] for n in draw.choice(BUCKETS, size=count, p=weights / weights.sum())]
    grouped = by_bucket(numbered(buckets))
    whole = timed(lambda: EpochPlan(by_bucket(numbered(buckets)), seed=0, chunk=32).epoch(1), 5)
    yield duration(f"epoch plan, {count:,} images, with the grouping", whole, "s", 1, 0.5 * count / MILLION)
    alone = timed(lambda: EpochPlan(grouped, seed=0, chunk=32).epoch(1), 5)
    yield duration(f"epoch plan, {count:,} images, grouped before", alone, "s", 1)


def index(count: int, parts: Components) -> Iterator[Row]:
    """Opening a folder of `count` small pictures, and what every start does with it; scaled to a million."""
    up = MILLION / count
    with tempfile.TemporaryDirectory() as name, disk_cache() as (_, cache):
        folder = Path(name)
        draw = np.random.default_rng(0)
        for number in range(count):
            picture = draw.integers(0, 256, (96, 96 + 32 * (number % 3), 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"picture number {number}")
        size = sum(file.stat().st_size for file in folder.glob("*.png")) / count / 1e3
        time.sleep(2.5)  # what changed just now is not remembered
        source = FolderSource(folder)
        scanned = source.scan()
        bucketing = config.build(config.compose([]).bucketing)
        encoder = Encoder(parts, cache, "fp32", torch.device("cpu"))
        million = f"a million images, from {count:,}"
        label = f"open the index, {million} of {size:.0f} kB"
        yield duration(label, timed(source.scan, 3), "s", up, 0.1)
        yield duration(f"fingerprint of the index, {million}", timed(scanned.fingerprint, 5), "s", up)
        # less what a single image takes too: the hash of the autoencoder's weights
        one = timed(lambda: encoder.latent_refs(Index(scanned.items[:1]), bucketing), 3)["median"]
        refs = {key: value - one for key, value in timed(lambda: encoder.latent_refs(scanned, bucketing), 3).items()}
        yield duration(f"keys of all latents, {million}", refs, "s", up)
        rows = encoder.latent_refs(scanned, bucketing)
        for row in rows:
            for ref in row:
                cache.put(ref.key, {"latents": torch.randn(4, 16, 16)})
        missing = timed(lambda: [ref.key in cache for row in rows for ref in row], 3)
        yield duration(f"look for all latents in the cache, {million}", missing, "s", up)


def main(arguments: list[str]) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "sdxl"), default="tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--resolution", type=int, nargs="+", help="pixels; default: the model's own")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=10, help="of each encoding")
    parser.add_argument("--samples", type=int, default=128, help="in the cache that is read from")
    parser.add_argument("--images", type=int, default=1000, help="in the folder that is opened")
    parser.add_argument("--planned", type=int, default=MILLION, help="images of the epoch plan")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    quiet_libraries()
    device = torch.device(args.device)
    parts = tiny_sdxl(seed=0) if args.size == "tiny" else sdxl_random(seed=0)
    rows: list[Row] = []
    for resolution, batch in itertools.product(args.resolution or [NATIVE[args.size]], args.batch):
        rows += images(parts, resolution, batch, device, args.repeats)
    rows += [captions(parts, batch, device, args.repeats) for batch in args.batch]
    rows += reading(SDXL, "SDXL's size", args.samples, 8)
    if args.size == "tiny":
        rows += reading(shapes(parts.unet, NATIVE["tiny"]), "tiny model", args.samples, 16)
    rows += plan(args.planned)
    rows += index(args.images, parts)
    settings: dict[str, Any] = {"model": args.size, "device": args.device, "repeats": args.repeats}
    write(f"cache_{args.size}", command(), settings, rows, args.out)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
