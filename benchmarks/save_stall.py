"""How long training stands still for a checkpoint, and for a report.

python benchmarks/save_stall.py                  the tiny model
python benchmarks/save_stall.py --size small     a UNet of SDXL's shape with 300 million parameters: 4.8 GB of state

`before` writes the whole state with safetensors while the loop waits, as version 0.1 did. `now` is what the loop waits
for the copy; `written` is when the last byte is on the disk. The state: weights, float32 averages, AdamW's two moments.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, Row, command, write
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.checkpoint import LocalCheckpoints, ModuleState
from nai_xl.engine.checkpoint_files import split_tensors
from nai_xl.model.sdxl.configs import SDXL_BASE
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.optimizer.ema import StandardEma
from nai_xl.record.journal import Journal

SMALL = {"block_out_channels": [96, 192, 384], "attention_head_dim": [2, 3, 6]}
REPORT = {f"train/loss_{number}": 0.123456789 for number in range(12)}
REPORTS = 100


class Alone:
    """What checkpoints ask of the strategy of a single process."""

    first, rank, world = True, 0, 1

    def wait(self) -> None:
        pass


def unet(size: str) -> torch.nn.Module:
    if size == "tiny":
        made: torch.nn.Module = tiny_sdxl(seed=0).unet
        return made
    config = json.loads((SDXL_BASE / "unet" / "config.json").read_text())
    made = UNet2DConditionModel.from_config({**config, **SMALL})
    return made


def state(module: torch.nn.Module) -> dict[str, Any]:
    """The parts of a checkpoint, after one step."""
    module.requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"unet": ModuleState(module), "ema": StandardEma(dict(module.named_parameters())), "optimizer": optimizer}


def save_before(folder: Path, parts: dict[str, Any]) -> None:
    folder.mkdir()
    for name, part in parts.items():
        tensors: dict[str, Any] = {}
        split_tensors(part.state_dict(), name, tensors)
        save_file({key: one.detach().contiguous() for key, one in tensors.items()}, folder / f"{name}.safetensors")


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def saving(size: str, rounds: int, folder: Path) -> Row:
    module = unet(size)
    parts = state(module)
    strategy: Strategy = Alone()  # type: ignore[assignment]
    made = LocalCheckpoints(folder / "now", keep=1, strategy=strategy)
    made.bind(**parts)
    before, now, written = [], [], []
    for number in range(rounds + 1):  # the first save allocates the memory for the copy
        before.append(timed(lambda number=number: save_before(folder / f"before_{number}", parts)))  # type: ignore[misc]
        began = time.perf_counter()
        now.append(timed(lambda number=number: made.save(number)))  # type: ignore[misc]
        made.finish()
        written.append(time.perf_counter() - began)
        for path in (folder / f"before_{number}").iterdir():
            path.unlink()
    return {
        "model": size,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "before, s": round(median(before[1:]), 4),
        "now, s": round(median(now[1:]), 4),
        "now, first save, s": round(now[0], 4),
        "written, s": round(median(written[1:]), 4),
    }


def reporting(folder: Path) -> Row:
    """A row of metrics.jsonl, with and without waiting for the disk."""
    journal, plain = Journal(folder / "metrics.jsonl"), folder / "plain.jsonl"

    def append() -> None:
        with plain.open("a", encoding="utf-8") as file:
            file.write(json.dumps(REPORT) + "\n")

    before = median(timed(append) for _ in range(REPORTS))
    now = median(timed(lambda: journal.append(**REPORT)) for _ in range(REPORTS))
    return {"report, before, ms": round(1e3 * before, 3), "report, now, ms": round(1e3 * now, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to write: the disk decides (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        row = saving(given.size, given.rounds, Path(folder)) | reporting(Path(folder))
    settings = {"size": given.size, "rounds": given.rounds}
    write(f"save_stall_{given.size}", command(), settings, [row], given.out)
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
