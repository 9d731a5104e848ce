"""A run that is killed with signal 9 again and again, at moments drawn at random, against an undisturbed one.

python benchmarks/kills.py [--arms one ddp fsdp2] [--kills 20] [--steps 60] [--seed 0] [--into FOLDER]

An arm is one process, or ddp or fsdp2 on two. The victim of each kill is drawn too: one rank, all ranks, the launcher.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from common import Row, command, write
from faulty import Start, differences, last_step, run_of

ARMS = {"one": (1, []), "ddp": (2, ["distributed=ddp"]), "fsdp2": (2, ["distributed=fsdp2"])}
SETTINGS = (
    "data=sample data.held_out=0.2 tracker=jsonl run.batch_size=2 run.chunk=4 run.log_every=1 run.checkpoint_every=5 "
    "sampling.steps=2 evals=[sample_grid,val_loss] evals.sample_grid.every=10 evals.sample_grid.count=2 "
    "evals.val_loss.every=10"
).split()
PATIENCE = 300.0  # seconds until a start counts as stuck


def overrides(arm: str, steps: int) -> list[str]:
    world, words = ARMS[arm]
    return [*SETTINGS, f"run.max_images={2 * world * steps}", *words]


def kill(start: Start, victim: str, random_: random.Random) -> None:
    ranks = start.ranks()
    targets = {
        "one rank": ranks and [random_.choice(ranks)],
        "all ranks": ranks,
        "the launcher": [psutil.Process(start.process.pid)],
    }[victim]
    for one in targets or [psutil.Process(start.process.pid)]:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)


def hurt(arm: str, folder: Path, kills: int, steps: int, random_: random.Random) -> tuple[dict[str, int], list[str]]:
    """Kill the run `kills` times and let it end then. How often each victim was killed, and the orphans."""
    world, counted, orphans = ARMS[arm][0], {"while starting": 0}, []
    victims = ["one rank", "all ranks", "the launcher"] if world > 1 else ["all ranks"]
    for target in sorted(random_.choices(range(steps + 1), k=kills)):
        start, victim = Start(folder, overrides(arm, steps), world), random_.choice(victims)
        starting = random_.random() < 0.15
        delay, began = random_.uniform(0, 8) if starting else random_.uniform(0, 0.8), time.monotonic()
        while not starting and last_step(folder) < target and start.process.poll() is None:
            if time.monotonic() - began > PATIENCE:
                orphans.append(f"stuck before step {target}")
                break
            time.sleep(0.05)
        time.sleep(delay)
        kill(start, victim, random_)
        orphans += start.clear(within=60)
        counted[victim] = counted.get(victim, 0) + 1
        counted["while starting"] += starting
        print(f"{arm}: killed {victim} after step {last_step(folder)}", file=sys.stderr, flush=True)
    last = Start(folder, overrides(arm, steps), world)
    code = last.process.wait()
    return counted, [*orphans, *([f"the last start ended with {code}"] if code else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path)
    asked = parser.parse_args()
    folder = asked.into or Path(tempfile.mkdtemp())
    rows: list[Row] = []
    for arm in asked.arms:
        shutil.rmtree(folder / arm, ignore_errors=True)
        whole = Start(folder / arm / "whole", overrides(arm, asked.steps), ARMS[arm][0])
        if whole.process.wait():
            sys.exit(f"the undisturbed run failed: {folder / arm / 'whole' / 'output.txt'}")
        counted, orphans = hurt(arm, folder / arm / "hurt", asked.kills, asked.steps, random.Random(asked.seed))
        runs = [run_of(folder / arm / kind) for kind in ("hurt", "whole")]
        assert runs[0] and runs[1]
        found = differences(runs[0], runs[1])
        print(*found, *orphans, sep="\n", file=sys.stderr)
        rows.append({"arm": arm, "kills": asked.kills, **counted, "orphans": len(orphans), "differences": len(found)})
    write("kills", command(), {"steps": asked.steps, "run": " ".join(SETTINGS)}, rows)
    sys.exit(any(row["orphans"] or row["differences"] for row in rows))


if __name__ == "__main__":
    main()
