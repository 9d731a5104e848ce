"""How fast images and captions are encoded.

python benchmarks/encoding.py                               tiny model, this machine's CPU
python benchmarks/encoding.py --size sdxl --device cuda --resolution 1024 --batch 1 4 8
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Row, command, spread, write

from nai_xl.model.quiet import quiet_libraries
from nai_xl.model.sdxl.components import Components
from nai_xl.model.sdxl_random import sdxl_random
from nai_xl.model.text import encode_texts
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.model.vae import encode_pixels

NATIVE = {"tiny": 128, "sdxl": 1024}


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of one call: median, p10, p90, mean over `repeats` after two to warm up."""
    times = []
    for number in range(repeats + 2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
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


def main(arguments: list[str]) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "sdxl"), default="tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--resolution", type=int, nargs="+", help="pixels; default: the model's own")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=10)
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
    settings: dict[str, Any] = {"model": args.size, "device": args.device, "repeats": args.repeats}
    write(f"encoding_{args.size}", command(), settings, rows, args.out)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
