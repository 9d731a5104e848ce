"""One run that goes from engine to engine and from world to world, against one that stays on one process.

python benchmarks/portability.py [--steps 3] [--into FOLDER]

Every leg is a command of its own, which continues what the leg before has saved: the same images a step and the same
chunk, split otherwise.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from common import Row, command, write
from faulty import Start, reported, run_of

IMAGES = 8  # a step, and a chunk
SETTINGS = (
    f"data=sample tracker=jsonl run.chunk={IMAGES} run.log_every=1 run.checkpoint_every=100 sampling.steps=2 "
    "evals.sample_grid.count=2"
).split()
LEGS = [
    (4, "fsdp2"),
    (1, "none"),
    (2, "ddp"),
    (4, "fsdp2"),
    (2, "deepspeed_zero3"),
    (2, "deepspeed_zero2"),
    (4, "ddp"),
    (2, "fsdp2"),
    (1, "none"),
]


def leg(folder: Path, world: int, engine: str, steps: int) -> None:
    """Train to step `steps` in `folder`. Ends the program if that fails."""
    words = [f"run.batch_size={IMAGES // world}", f"run.max_images={IMAGES * steps}", f"distributed={engine}"]
    if Start(folder, [*SETTINGS, *words], world).process.wait():
        sys.exit(f"{engine} on {world} failed: {folder / 'output.txt'}")


def losses(folder: Path) -> dict[int, float]:
    run = run_of(folder)
    assert run, f"no run, or several, below {folder}"
    return {row["step"]: row["train/loss"] for row in reported(run)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="of each leg")
    parser.add_argument("--into", type=Path)
    asked = parser.parse_args()
    folder = asked.into or Path(tempfile.mkdtemp())
    for kind in ("moving", "staying"):
        shutil.rmtree(folder / kind, ignore_errors=True)
    leg(folder / "staying", 1, "none", asked.steps * len(LEGS))
    whole = losses(folder / "staying")
    rows: list[Row] = []
    for number, (world, engine) in enumerate(LEGS):
        leg(folder / "moving", world, engine, asked.steps * (number + 1))
        moved, first = losses(folder / "moving"), asked.steps * number + 1
        steps = range(first, first + asked.steps)
        apart = max(abs(moved[step] - whole[step]) / abs(whole[step]) for step in steps)
        rows.append(
            {"steps": f"{steps[0]} to {steps[-1]}", "engine": engine, "world": world, "largest difference": apart}
        )
    assert len(list((folder / "moving" / "outputs").glob("*/config.yaml"))) == 1
    write("portability", command(), {"run": " ".join(SETTINGS), "difference": "relative, of train/loss"}, rows)


if __name__ == "__main__":
    main()
