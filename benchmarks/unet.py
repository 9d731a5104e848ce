"""Training speed of the UNet: images a second, TFLOP/s, MFU and peak memory, ours and a bare loop, on random inputs.

python benchmarks/unet.py                                        full size, batches 1 and 8, on this machine's GPU
python benchmarks/unet.py --size tiny --batch 4 --resolution 128 --device cpu
python benchmarks/unet.py --arm bare --arm 'precision=bf16 memory=[sdpa,compile]' --arm bare

An arm is `bare`, or the overrides of a run: exactly what `python -m nai_xl.train` would train with, less the loader.
Every arm at every batch and resolution is a process of its own, in the order given; running out of memory is a result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    Bare,
    Row,
    Shapes,
    Ticks,
    command,
    random_batch,
    random_data,
    shapes,
    spread,
    training,
    write,
)

from nai_xl.data.cache import MemoryCache
from nai_xl.engine import gpus
from nai_xl.engine.loop import train
from nai_xl.engine.stop import Stop
from nai_xl.model.flops import training_flops
from nai_xl.model.sdxl_random import random_unet
from nai_xl.model.tiny import tiny_sdxl

NATIVE = {"tiny": 128, "sdxl": 1024}
AUTOCAST = "precision=bf16"
ARMS = (
    "bare",
    AUTOCAST,
    f"{AUTOCAST} memory=[sdpa,channels_last]",
    f"{AUTOCAST} memory=[sdpa,gradient_checkpointing]",
    "bare",
)
DIFFERENT = 4  # micro-batches that take turns
GIB = 1 << 30
MARK = "result "


# --- one measurement, in a process of its own -------------------------------------------------------------------------


def measure(size: str, arm: str, batch: int, resolution: int, warm_up: int, steps: int) -> Row:
    """A row of the table. Raises torch.OutOfMemoryError."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = tiny_sdxl(seed=0).unet if size == "tiny" else random_unet(seed=0, device=device)
    shape = shapes(unet, resolution)
    batches = [random_batch(shape, batch, device, seed=seed) for seed in range(DIFFERENT)]
    ticks = Ticks(itertools.cycle(batches), device)
    flops = batch * training_flops(unet, resolution, resolution)
    with tempfile.TemporaryDirectory() as folder:
        run = _bare(unet, ticks, device) if arm == "bare" else _ours(unet, ticks, shape, batch, arm, Path(folder))
        began = time.perf_counter()
        run(1)
        _wait(device)
        first = time.perf_counter() - began  # compilation and the search for algorithms are in it
        run(warm_up)
        ticks.mark()
        ticks.seconds()
        run(steps)
        ticks.mark()
        found = spread(ticks.seconds())
    return {
        "images/s": batch / found["median"],
        **{f"{key} ms": 1000 * found[key] for key in ("median", "p10", "p90")},
        "TFLOP/s": flops / found["median"] / 1e12,
        "first step s": first - found["median"],
        **_memory(device),
    }


def _bare(unet: Any, ticks: Ticks, device: torch.device) -> Callable[[int], None]:
    """float32 weights, bf16 autocast, torch's own AdamW and attention, clip: what a person writes first."""
    unet.to(device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    loop = Bare(unet, optimizer, device, "bf16")

    def run(steps: int) -> None:
        loop.steps(ticks, steps)
        loop.losses.clear()
        loop.norms.clear()

    return run


def _ours(unet: Any, ticks: Ticks, shape: Shapes, batch: int, arm: str, folder: Path) -> Callable[[int], None]:
    """Our loop as these overrides assemble it; EMA off unless they choose one. One report, at the end of each call."""
    ema = [] if "ema=" in arm else ["ema=none"]
    overrides = [*ema, *arm.split(), f"run.batch_size={batch}", "run.log_every=1000000"]
    settings, parts = training(overrides, unet, random_data(shape, batch, MemoryCache()), folder)
    parts.batches = ticks
    done = 0

    def run(steps: int) -> None:
        nonlocal done
        done = train(settings, parts, start=done, steps=done + steps, stop=Stop())

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory(device: torch.device) -> Row:
    """Peak memory: of tensors and of torch's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return {
            "peak GiB": torch.cuda.max_memory_allocated() / GIB,
            "reserved GiB": torch.cuda.max_memory_reserved() / GIB,
        }
    return {"peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}


def gemm_tflops(edge: int = 8192, repeats: int = 30) -> float:
    """TFLOP/s of a bf16 product of random square matrices, the median: what this device gives at best in practice."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    edge = edge if device.type == "cuda" else edge // 16
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    ticks = Ticks(itertools.repeat(None), device)  # type: ignore[arg-type]
    for number in range(repeats + 10):
        if number == 10:
            ticks.marks.clear()
        next(ticks)
        torch.matmul(a, b)
    ticks.mark()
    return 2 * edge**3 / spread(ticks.seconds())["median"] / 1e12


# --- all of them ------------------------------------------------------------------------------------------------------


def in_a_process(job: dict[str, Any]) -> Row:
    """`job` measured by this file in a new process; {"failed": ...} where it ran out of memory or did not end well."""
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True, check=False
    )
    results = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if results:
        return dict(json.loads(results[-1]))
    if done.returncode < 0:
        return {"failed": f"ended by signal {-done.returncode}"}  # 9: the machine's memory ran out
    told = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return {"failed": (told or ["no result"])[-1][:200]}


def one_job(job: dict[str, Any]) -> Row:
    if job.get("gemm"):
        return {"TFLOP/s": gemm_tflops()}
    try:
        return measure(**job)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}


def main(arguments: list[str]) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "sdxl"), default="sdxl")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--resolution", type=int, nargs="+", help="pixels; default: the model's own")
    parser.add_argument("--arm", action="append", help="bare, or a run's overrides; default: a choice of both")
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--name", default="unet", help="of the result files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.job:
        print(MARK + json.dumps(one_job(args.job)))
        return []
    if (args.device == "cuda") != torch.cuda.is_available():
        raise SystemExit(
            f"--device {args.device}: give --device cpu without a GPU, and hide it (CUDA_VISIBLE_DEVICES=)"
        )
    gpu = gpus.find(torch.cuda.get_device_name()) if args.device == "cuda" else None
    best = in_a_process({"gemm": True}).get("TFLOP/s")
    rows: list[Row] = []
    for resolution, batch in itertools.product(args.resolution or [NATIVE[args.size]], args.batch):
        for arm in args.arm or ARMS:
            job = {"size": args.size, "arm": arm, "batch": batch, "resolution": resolution}
            found = in_a_process({**job, "warm_up": args.warm_up, "steps": args.steps})
            if "failed" not in found:
                found["MFU %"] = 100 * found["TFLOP/s"] / gpu.bf16_tflops if gpu else None
                found["of GEMM %"] = 100 * found["TFLOP/s"] / best if best else None
            rows.append({key: job[key] for key in ("arm", "batch", "resolution")} | found)
            print(rows[-1], flush=True)
    settings = {"model": args.size, "warm-up": args.warm_up, "steps": args.steps, "bf16 GEMM TFLOP/s": best}
    settings["datasheet TFLOP/s"] = gpu.bf16_tflops if gpu else None
    write(args.name, command(), settings, rows, args.out)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
