"""Does a run stay the same run on any engine and number of processes? Tiny model, CPU, gloo.

python benchmarks/distributed.py [--steps 6] [--worlds 1 2 4] [--engines fsdp2 ...] [--features plain ...]

Every cell is the largest relative difference of a step's loss to that of one process with distributed=none and the same
feature, at equal images a step and equal run.chunk. Processes of one world are started once, by torchrun, and try all
engines one after the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Row, command, random_data, shapes, training, write

from nai_xl.data.cache import DiskCache
from nai_xl.engine.hooks import NoHook
from nai_xl.engine.loop import train
from nai_xl.engine.stop import Stop
from nai_xl.errors import UserError
from nai_xl.memory import process_wide
from nai_xl.model.tiny import tiny_sdxl

IMAGES = 8  # a micro-batch of all processes, and a chunk
ENGINES = {
    "ddp": ["distributed=ddp"],
    "fsdp2": ["distributed=fsdp2"],
    "hsdp": ["distributed=fsdp2", "distributed.shard_size=2"],
    "deepspeed_zero2": ["distributed=deepspeed_zero2"],
    "deepspeed_zero3": ["distributed=deepspeed_zero3"],
}
FEATURES = {
    "plain": ["ema=none"],
    "accumulation 2": ["ema=none", "run.grad_accum=2"],
    "bf16 autocast": ["ema=none", "precision=bf16"],
    "checkpointing": ["ema=none", "memory=[sdpa,gradient_checkpointing]"],
    "adamw8bit": ["ema=none", "optimizer=adamw8bit"],
    "EMA": ["ema=standard"],
}


class Losses(NoHook):
    """The loss of every step, as the run reports it."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def __call__(self, step: int, values: dict[str, float], *, last: bool) -> None:
        self.values.append(values["train/loss"])


def trained(overrides: Sequence[str], steps: int, world: int, folder: Path) -> dict[str, Any]:
    """Losses of a short run, the parameters' bytes on this rank, and one number of the averages that it ends with."""
    unet = tiny_sdxl(seed=0).unet
    data = random_data(shapes(unet, 64), 16, DiskCache(folder / "cache"))
    run = [f"run.batch_size={IMAGES // world}", f"run.chunk={IMAGES}", "run.log_every=1", "lr.warmup=0"]
    with process_wide.restored():
        settings, parts = training(["tracker=jsonl", "optimizer.lr=1e-3", *run, *overrides], unet, data, folder)
        seen = Losses()
        train(settings, replace(parts, hooks=[seen]), start=0, steps=steps, stop=Stop())
        held = sum(bytes_of(p) for p in parts.state.trainable.parameters.values())
        averages = parts.state.averages().values()
        total = sum(float(average.double().square().sum()) for average in averages)
    return {"losses": seen.values, "bytes": held, "averages": total}


def bytes_of(p: Any) -> int:
    """Of a parameter, or of this rank's part of it; ZeRO 3 has that beside an empty parameter."""
    kept = getattr(p, "ds_tensor", p)
    return int(kept.numel() * kept.element_size())


def attempted(overrides: Sequence[str], steps: int, world: int, folder: Path) -> dict[str, Any]:
    """As `trained`; why not, if it is refused or cannot run here. Every rank fails alike, or the launcher ends all."""
    try:
        return trained(overrides, steps, world, folder)
    except (UserError, RuntimeError, ValueError, NotImplementedError) as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        return {"why": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def work(asked: dict[str, list[str]], steps: int, folder: Path) -> None:
    """What each process of a world does: every run by name, into FOLDER/RANK.json."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found = {}
    for name, overrides in asked.items():
        found[name] = attempted(overrides, steps, world, folder)
        gc.collect()
        if rank == 0:
            print(name, {key: value for key, value in found[name].items() if key != "losses"}, flush=True)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def launched(asked: dict[str, list[str]], steps: int, world: int) -> list[dict[str, Any]]:
    """What every rank of a world of this size found."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
        words = ["--work", json.dumps(asked), "--steps", str(steps), "--folder", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, *torchrun, __file__, *words], env=environment, check=True)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def rows_of(engines: Sequence[str], features: Sequence[str], worlds: Sequence[int], steps: int) -> list[Row]:
    alone = launched({name: ["distributed=none", *FEATURES[name]] for name in features}, steps, 1)[0]
    rows: list[Row] = []
    for world in worlds:
        asked = {
            f"{engine}: {name}": [*ENGINES[engine], *FEATURES[name]]
            for engine in engines
            for name in features
            if engine != "hsdp" or world == 4
        }
        found = launched(asked, steps, world)
        for key, first in found[0].items():
            engine, _, name = key.partition(": ")
            rows.append({"engine": engine, "world": world, "feature": name, **told(first, alone[name], found, key)})
    return rows


def told(first: dict[str, Any], alone: dict[str, Any], ranks: list[dict[str, Any]], key: str) -> Row:
    if "why" in first:
        return {"largest difference": None, "parameters' bytes by rank": "", "not run": first["why"]}
    pairs = zip(first["losses"], alone["losses"], strict=True)
    largest = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    held = " ".join(f"{rank[key]['bytes']:,}" for rank in ranks)
    return {"largest difference": largest, "parameters' bytes by rank": held, "not run": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--name", default="distributed", help="of the files in benchmarks/results")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.steps, given.folder)
        return
    rows = rows_of(given.engines, given.features, given.worlds, given.steps)
    write(given.name, command(), {"steps": given.steps, "images a micro-batch": IMAGES}, rows)


if __name__ == "__main__":
    main()
