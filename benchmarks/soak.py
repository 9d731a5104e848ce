"""A run on two processes that is hurt once a minute in another way, and started again by the same command each time.

python benchmarks/soak.py [--minutes 30] [--engine ddp] [--every 60] [--seed 0] [--into FOLDER]

Afterwards an undisturbed run of as many steps says whether every number is what it must be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from common import Row, command, write
from faulty import Start, differences, last_step, reported, run_of

SETTINGS = (
    "data=sample data.held_out=0.2 tracker=jsonl run.batch_size=2 run.log_every=10 run.checkpoint_every=50 "
    "sampling.steps=2 evals=[sample_grid,val_loss] evals.sample_grid.every=100 evals.sample_grid.count=2 "
    "evals.val_loss.every=100 distributed.timeout=0.25"
).split()
WORLD = 2
SETTLED = 25.0  # seconds after a start when its memory is looked at


def _send(number: int, whom: str) -> Callable[[Start, random.Random], None]:
    def fault(start: Start, random_: random.Random) -> None:
        ranks = start.ranks()
        chosen = {"rank": ranks and [random_.choice(ranks)], "ranks": ranks, "launcher": []}[whom]
        for one in chosen or [psutil.Process(start.process.pid)]:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    return fault


def _newest(start: Start) -> Path | None:
    run = run_of(start.folder)
    found = sorted(run.glob("checkpoints/step_????????/")) if run else []
    return found[-1] if found else None


def _flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _flip_weights(start: Start, random_: random.Random) -> None:
    _send(signal.SIGKILL, "ranks")(start, random_)
    start.clear(within=60)
    if newest := _newest(start):
        _flip(random_.choice(sorted(newest.glob("*.safetensors"))))


def _empty_state(start: Start, random_: random.Random) -> None:
    _send(signal.SIGKILL, "ranks")(start, random_)
    start.clear(within=60)
    if newest := _newest(start):
        (newest / "state.json").write_bytes(b"")


FAULTS: dict[str, Callable[[Start, random.Random], None]] = {
    "SIGKILL to a rank": _send(signal.SIGKILL, "rank"),
    "SIGTERM to the launcher": _send(signal.SIGTERM, "launcher"),
    "SIGUSR1 to a rank": _send(signal.SIGUSR1, "rank"),
    "SIGKILL to the launcher": _send(signal.SIGKILL, "launcher"),
    "a bit of the newest checkpoint": _flip_weights,
    "SIGSTOP to a rank": _send(signal.SIGSTOP, "rank"),
    "SIGHUP to all ranks": _send(signal.SIGHUP, "ranks"),
    "an empty state.json": _empty_state,
}


@dataclass
class Seen:
    """What is measured on the way: resident MiB of the first rank at each look, by start, and what went wrong."""

    memory: list[list[float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def look(self, start: Start, began: float) -> None:
        if time.monotonic() - began > SETTLED and (ranks := start.ranks()):
            with suppress(psutil.NoSuchProcess):
                self.memory[-1].append(ranks[0].memory_info().rss / 2**20)


def soak(
    folder: Path, words: list[str], minutes: float, every: float, random_: random.Random
) -> tuple[Seen, dict[str, int]]:
    """Hurt the run every `every` seconds for so many minutes, then ask it to stop."""
    seen, counted, until = Seen(), dict.fromkeys(FAULTS, 0), time.monotonic() + 60 * minutes
    faults = itertools.cycle(FAULTS)
    while time.monotonic() < until:
        start, began, before = Start(folder, words, WORLD), time.monotonic(), last_step(folder)
        seen.memory.append([])
        while time.monotonic() - began < every and start.process.poll() is None:
            time.sleep(5)
            seen.look(start, began)
        if start.process.poll() is not None:
            seen.wrong.append(f"ended by itself with {start.process.returncode} after step {last_step(folder)}")
        name = next(faults)
        FAULTS[name](start, random_)
        counted[name] += 1
        seen.wrong += [f"{name}: orphan {line}" for line in start.clear(within=90)]
        print(f"{name}: step {before} to {last_step(folder)}", file=sys.stderr, flush=True)
    last = Start(folder, words, WORLD)
    time.sleep(30)
    last.process.send_signal(signal.SIGTERM)
    last.clear(within=90)
    return seen, counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=60)
    parser.add_argument("--engine", default="ddp")
    parser.add_argument("--compared", type=int, default=10**9, help="the first steps that an undisturbed run repeats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path)
    asked = parser.parse_args()
    folder = asked.into or Path(tempfile.mkdtemp())
    shutil.rmtree(folder / "hurt", ignore_errors=True)
    shutil.rmtree(folder / "whole", ignore_errors=True)
    words = [*SETTINGS, f"distributed={asked.engine}"]
    seen, counted = soak(
        folder / "hurt", [*words, "run.max_images=10000000"], asked.minutes, asked.every, random.Random(asked.seed)
    )
    hurt = run_of(folder / "hurt")
    assert hurt
    steps = max(row["step"] for row in reported(hurt))
    images = json.loads((hurt / "arm.json").read_text())["images"]
    compared = min(steps, asked.compared)
    whole = Start(folder / "whole", [*words, f"run.max_images={2 * WORLD * compared}"], WORLD)
    whole.process.wait()
    undisturbed = run_of(folder / "whole")
    assert undisturbed
    # the undisturbed run evaluates at its last step, the other did not
    found = [
        one for one in differences(hurt, undisturbed) if one.startswith("step ") and f"step {compared}:" not in one
    ]
    rows = [row["step"] for row in reported(hurt)]
    found += [f"rows of steps {rows}"] * (rows != sorted({*range(10, steps + 1, 10), steps}))
    print(*found, *seen.wrong, sep="\n", file=sys.stderr)
    looks = [looks for looks in seen.memory if looks]
    row: Row = {
        "engine": asked.engine,
        "minutes": asked.minutes,
        "faults": sum(counted.values()),
        "steps reported": steps,
        "images": images,
        "images a step": images / steps if steps else None,
        "steps compared": compared,
        "wrong numbers": len(found),
        "wrong ends": len(seen.wrong),
        "MiB at first": looks[0][0] if looks else None,
        "MiB at last": looks[-1][-1] if looks else None,
    }
    write("soak", command(), {"run": " ".join(words), **counted}, [row])


if __name__ == "__main__":
    main()
