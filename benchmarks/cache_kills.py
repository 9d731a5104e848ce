"""A cache that two processes fill and that is killed with signal 9 at moments of chance, against an undisturbed one.

python benchmarks/cache_kills.py [--images 500] [--processes 2] [--kills 5] [--seed 0] [--into FOLDER]

Each start is `torchrun -m nai_xl.precompute`, whose processes are killed all at once after a number of entries drawn
beforehand. Then it is let end, and every entry is compared, bit for bit, with those of a cache that was left alone.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from common import Row, command, write
from numpy.typing import NDArray
from PIL import Image

from nai_xl.data.cache import FOLDER, DiskCache
from nai_xl.data.shards.catalogue import Catalogue
from nai_xl.data.shards.shard import KEYS, RECORD, read_records

SIDES = ((64, 64), (96, 64), (64, 96))
PATIENCE = 600.0  # seconds until a start counts as stuck


def pictures(folder: Path, count: int) -> None:
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(SIDES[number % len(SIDES)]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")


def begin(home: Path, cache: Path, processes: int) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    overrides = [
        "data=folder",
        f"data.dir={home / 'images'}",
        f"cache.dir={cache}",
        "bucketing.resolution=64",
        "distributed=ddp" if processes > 1 else "distributed=none",
        f"output_dir={home / 'outputs'}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (home / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "nai_xl.precompute", *overrides],
            env=environment,
            stdout=output,
            stderr=output,
        )


def kill(start: subprocess.Popen[bytes]) -> None:
    """The launcher and all of its processes."""
    everyone = [psutil.Process(start.pid), *psutil.Process(start.pid).children(recursive=True)]
    for one in everyone:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    psutil.wait_procs(everyone, timeout=60)


def written(cache: Path) -> int:
    return sum(shard.rows for shard in Catalogue.read(cache / FOLDER).shards)


def keys_of(cache: Path) -> NDArray[np.uint8]:
    """[M,16] of every record, those of entries that were made twice or have died too."""
    catalogue = Catalogue.read(cache / FOLDER)
    parts = [read_records(cache / FOLDER / f"{s.stem}{KEYS}", s.line, 0, s.rows) for s in catalogue.shards]
    # joined as bytes: numpy would turn the numbers round to the machine's order
    return np.concatenate([part.view(np.uint8).reshape(-1, RECORD.itemsize) for part in parts])[:, :16]


def unequal(one: Path, other: Path) -> int:
    """Entries that are not in both caches, or not the same in both."""
    caches = DiskCache(one), DiskCache(other)
    every = {key.tobytes().hex() for cache in (one, other) for key in keys_of(cache)}
    count = 0
    for key in every:
        found, expected = (cache.get(key) for cache in caches)
        same = found is not None and expected is not None and found.keys() == expected.keys()
        count += not (same and all(found[name].equal(expected[name]) for name in found))  # type: ignore[index,union-attr]
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path)
    asked = parser.parse_args()
    home = asked.into or Path(tempfile.mkdtemp())
    pictures(home / "images", asked.images)
    whole, hurt = home / "whole", home / "hurt"
    if begin(home, whole, asked.processes).wait():
        sys.exit(f"the undisturbed start failed: {home / 'output.txt'}")
    total, draw = written(whole), random.Random(asked.seed)
    killed_at = []
    for wanted in sorted(draw.sample(range(total), asked.kills)):
        start, began = begin(home, hurt, asked.processes), time.monotonic()
        while written(hurt) < wanted and start.poll() is None and time.monotonic() - began < PATIENCE:
            time.sleep(draw.random() * 0.02)
        kill(start)
        killed_at.append(written(hurt))
        print(f"killed at {killed_at[-1]} of {total} entries", file=sys.stderr, flush=True)
    code = begin(home, hurt, asked.processes).wait()
    differences = unequal(hurt, whole)
    row: Row = {
        "images": asked.images,
        "processes": asked.processes,
        "killed at entries": " ".join(map(str, killed_at)),
        "status in the end": code,
        "entries": total,
        "entries made in all": written(hurt),
        "entries that differ": differences,
    }
    write("cache_kills", command(), {"seed": asked.seed, "model": "tiny", "resolution": 64}, [row])
    if asked.into is None:
        shutil.rmtree(home)
    sys.exit(bool(code or differences))


if __name__ == "__main__":
    main()
