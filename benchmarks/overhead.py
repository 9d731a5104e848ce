"""What the training loop costs beside its mathematics: ours against a bare PyTorch loop, tiny model, one process.

python benchmarks/overhead.py [--steps 20] [--rounds 15] [--threads 2]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from common import (
    RESULTS,
    Bare,
    Clock,
    Row,
    Ticks,
    command,
    disk_cache,
    interleave,
    random_data,
    shapes,
    spread,
    training,
    watched,
    write,
)

from nai_xl.engine.hooks import NoHook
from nai_xl.engine.loop import RunSettings, train
from nai_xl.engine.stop import Stop
from nai_xl.interfaces import Batch
from nai_xl.model.tiny import tiny_sdxl

RESOLUTION, LR = 128, 1e-3
ARM = ["tracker=jsonl", "lr.warmup=0"]
AGREE = 1e-5  # relative, float32: only the order of additions differs


class Ours:
    """Our loop, run a window of steps at a time."""

    def __init__(self, ema: str, batch: int, folder: Path, unet: torch.nn.Module, data: object):
        self.settings, self.parts = training([*ARM, f"ema={ema}", f"run.batch_size={batch}"], unet, data, folder)  # type: ignore[arg-type]
        self.loader, self.step = self.parts.batches, 0

    def run(self, batches: Iterator[Batch], count: int, settings: RunSettings | None = None) -> None:
        self.parts.batches = batches
        stop = self.step + count
        train(settings or self.settings, self.parts, start=self.step, steps=stop, stop=Stop())
        self.step = stop


class Seen(NoHook):
    """A hook that keeps what is reported."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        self.values.append(values)


def bare_loop(unet: torch.nn.Module, device: torch.device) -> Bare:
    """The same optimizer as conf/optimizer/adamw.yaml, called by hand."""
    unet.to(device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True)
    return Bare(unet, optimizer, device)


def agreement(ours: Ours, bare: Bare, batches: list[Batch]) -> dict[str, float]:
    """The largest relative difference of losses and gradient norms over some steps from the same weights."""
    seen = Seen()
    ours.parts.hooks = [seen]
    ours.run(iter(batches), len(batches), replace(ours.settings, log_every=1))
    ours.parts.hooks = []
    bare.steps(iter(batches), len(batches))
    pairs = {
        "loss": zip((v["train/loss"] for v in seen.values), map(float, bare.losses), strict=True),
        "grad_norm": zip((v["train/grad_norm"] for v in seen.values), map(float, bare.norms), strict=True),
    }
    return {name: max(abs(a - b) / abs(b) for a, b in rows) for name, rows in pairs.items()}


def timed(
    run: Callable[[Iterator[Batch], int], None], batches: Iterator[Batch], device: torch.device, count: int
) -> Callable[[], list[float]]:
    """An arm for `interleave`: a window of `count` steps."""
    ticks = Ticks(batches, device)

    def window() -> list[float]:
        run(ticks, count)
        ticks.mark()
        return ticks.seconds()

    return window


def against_bare(windows: dict[str, list[list[float]]]) -> list[Row]:
    """Rows in ms. Overheads are of each round's medians against that round's bare windows, so that drift cancels."""
    rows = []
    medians = {name: [median(window) for window in found] for name, found in windows.items()}
    bare = [(a + b) / 2 for a, b in zip(medians["bare"], medians["bare again"], strict=True)]
    for name, found in windows.items():
        own = {key: 1000 * value for key, value in spread(list(itertools.chain(*found))).items()}
        extra = spread([1000 * (m - b) for m, b in zip(medians[name], bare, strict=True)])
        share = spread([100 * (m / b - 1) for m, b in zip(medians[name], bare, strict=True)])
        row: Row = {"arm": name, **{f"{key} ms": value for key, value in own.items()}}
        row |= {"overhead ms": extra["median"], "p10..p90 ms": f"{extra['p10']:.3g}..{extra['p90']:.3g}"}
        rows.append(row | {"overhead %": share["median"]})
    return rows


def breakdown(ours: Ours, bare: Bare, batches: list[Batch], count: int) -> list[Row]:
    """Milliseconds a step under each name, in our loop with its loader and in the bare one; see common.Watched."""

    def measure(run: Callable[[Clock], None]) -> dict[str, float]:
        clock, began = Clock(), time.perf_counter()
        run(clock)
        total = time.perf_counter() - began
        return {**clock.seconds, "loop itself": total - sum(clock.seconds.values())}

    def run_ours(clock: Clock) -> None:
        ours.parts.batches = ours.loader
        parts = watched(ours.parts, clock)
        train(ours.settings, parts, start=ours.step, steps=ours.step + count, stop=Stop())
        ours.step += count

    theirs = measure(lambda clock: bare.steps(itertools.cycle(batches), count, clock))
    mine = measure(run_ours)
    names = sorted({*mine, *theirs}, key=lambda name: theirs.get(name, 0.0) - mine.get(name, 0.0))
    rows = [
        {"part": n, "ours ms": 1000 * mine.get(n, 0.0) / count, "bare ms": 1000 * theirs.get(n, 0.0) / count}
        for n in names
    ]
    return [row | {"difference ms": row["ours ms"] - row["bare ms"]} for row in rows]  # type: ignore[operator]


def main(arguments: list[str]) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of a window; one report each, as with run.log_every=20")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    unet = tiny_sdxl(seed=0).unet
    with disk_cache() as (folder, cache):
        data = random_data(shapes(unet, RESOLUTION), 16 * args.batch, cache)
        bare_unet = copy.deepcopy(unet)
        ours, with_ema = (
            Ours(ema, args.batch, folder / ema, copy.deepcopy(unet), data) for ema in ("none", "standard")
        )
        device = ours.parts.state.strategy.device
        bare = bare_loop(bare_unet, device)
        batches = list(itertools.islice(ours.loader, 8))
        agree = agreement(ours, bare, batches)
        if max(agree.values()) > AGREE:
            raise SystemExit(f"the two loops do not compute the same: {agree}")
        windows = interleave(
            {
                "bare": timed(bare.steps, itertools.cycle(batches), device, args.steps),
                "ours": timed(ours.run, ours.loader, device, args.steps),
                "ours, batches in memory": timed(ours.run, itertools.cycle(batches), device, args.steps),
                "ours, ema=standard": timed(with_ema.run, with_ema.loader, device, args.steps),
            },
            args.rounds,
        )
        parts = breakdown(ours, bare, batches, max(args.steps, 2))
    settings = {
        "model": "tiny",
        "resolution": RESOLUTION,
        "batch": args.batch,
        "window": args.steps,
        "rounds": args.rounds,
    }
    settings |= {f"{name} differs by": f"{value:.1e}" for name, value in agree.items()}
    rows = against_bare(windows)
    write("overhead", command(), settings, rows, args.out)
    write("overhead_parts", command(), settings, parts, args.out)
    return {"agree": agree, "rows": rows, "parts": parts}


if __name__ == "__main__":
    main(sys.argv[1:])
