"""What data cost that grow with the number of images: a start by its parts, memory, the plan, reading.

python benchmarks/data.py                                   10^4 to 10^7 images, folders of 10^4 and 10^5
python benchmarks/data.py --sizes 1e4 1e5 --before COMMIT   beside that commit of this repository

Every measurement is made in a process of its own. Index files are generated, and the cache has all of their keys;
latents lie in it only where they are read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common import RESULTS, Row, command, write
from data_made import CHUNK, READ, READ_SMALL, write_folder, write_index

HERE = Path(__file__).parent
MICRO = 1e6  # microseconds in a second
BEFORE_MOST = 100_000  # images: the version before takes minutes for more


class Aim(NamedTuple):
    images: int
    most: float


class Part(NamedTuple):
    """A line of the table. process, name: where the figure comes from; factor turns it into `unit`."""

    what: str
    unit: str
    process: str
    name: str
    factor: float = 1
    aim: Aim | None = None
    grows: bool = True  # a growth exponent says something


MILLION = 1_000_000
PARTS = (
    Part("a folder of pictures, first start", "s", "folder", "first"),
    Part("a folder of pictures, second start", "s", "folder", "second"),
    Part("open the index", "s", "times", "open", aim=Aim(MILLION, 0.1)),
    Part("hold out 1 %", "s", "times", "hold out"),
    Part("buckets", "s", "times", "buckets"),
    Part("cache keys of all placements", "s", "times", "keys"),
    Part("look for all keys in the cache", "s", "times", "look up"),
    Part("sample weights", "s", "times", "weights"),
    Part("fingerprint, first start", "s", "times", "fingerprint"),
    Part("fingerprint, later starts", "s", "times", "fingerprint noted", grows=False),
    Part("plan, to the first batch", "s", "times", "plan", aim=Aim(MILLION, 0.2)),
    Part("plan, to the batch in the middle of an epoch", "s", "times", "resume"),
    Part("private memory of a run's data", "bytes an image", "memory", "private", aim=Aim(MILLION, 40), grows=False),
    Part("resident memory of a run's data", "bytes an image", "memory", "rss", grows=False),
    Part("private memory of a run's data", "MiB", "memory", "private MiB"),
    Part("resident memory at most, during the start", "MiB", "memory", "peak MiB"),
    Part("private memory of a worker", "MiB", "memory", "worker MiB"),
    Part("growth of a worker", "bytes an image read", "memory", "worker a read", grows=False),
    Part("read a latent", "us", "reading", "latent median", MICRO, Aim(MILLION, 50), grows=False),
    Part("read a latent, 99th percentile", "us", "reading", "latent p99", MICRO, grows=False),
    Part("read a text", "us", "reading", "text median", MICRO, grows=False),
    Part("read a text, 99th percentile", "us", "reading", "text p99", MICRO, grows=False),
    Part("loader without workers", "samples/s", "reading", "samples/s, 0 workers", grows=False),
    Part("loader with 2 workers", "samples/s", "reading", "samples/s, 2 workers", grows=False),
)
Found = dict[tuple[str, str], dict[int, float]]  # process, name -> images -> figure


def process(script: str, *arguments: object, version: Path | None = None, home: Path | None = None) -> dict[str, float]:
    """What a script of this folder tells. version: another checkout whose nai_xl it imports; home: its user's cache."""
    environment = {**os.environ, "PYTHONPATH": str(version or HERE.parent), "OMP_NUM_THREADS": "1"}
    if home is not None:
        environment["NAI_XL_CACHE"] = str(home)
    line = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(
        line, env=environment, cwd=version or HERE.parent, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def note(found: Found, what: str, count: int, figures: dict[str, float]) -> None:
    for name, figure in figures.items():
        found.setdefault((what, name), {})[count] = figure


def measure(count: int, folder: Path, now: Found, before: Found, version: Path | None) -> None:
    """Index files of `count` images, and a cache of as many keys."""
    index = folder / "index.arrow"
    write_index(index, count)
    process("data_now.py", "fill", index, folder)
    for what in ("times", "memory", "reading"):
        note(now, what, count, process("data_now.py", what, index, folder))
        if version is not None and count <= BEFORE_MOST:
            note(before, what, count, process("data_before.py", what, index, folder, version=version))


def measure_folder(count: int, folder: Path, now: Found, before: Found, version: Path | None) -> None:
    """Starts of `count` tiny pictures: nothing is known of them, and then nothing has changed."""
    pictures = folder / "pictures"
    write_folder(pictures, count)
    for found, checkout in ((now, None), (before, version)):
        if found is before and checkout is None:
            continue
        home = folder / ("home_before" if checkout else "home_now")
        for start in ("first", "second"):
            seconds = process("data_folder.py", pictures, version=checkout, home=home)["scan"]
            note(found, "folder", count, {start: seconds})


def growth(figures: dict[int, float]) -> str:
    """The exponents between neighbouring sizes: 1 is linear."""
    pairs = itertools.pairwise(sorted(figures))
    return " ".join(
        f"{math.log(figures[large] / figures[small]) / math.log(large / small):.1f}"
        for small, large in pairs
        if figures[small] > 0 and figures[large] > 0
    )


def rows(now: Found, before: Found, sizes: Sequence[int]) -> Iterator[Row]:
    for part in PARTS:
        for version, found in (("now", now), ("before", before)):
            figures = found.get((part.process, part.name))
            if figures is None:
                continue
            row: Row = {"what": part.what, "unit": part.unit, "version": version}
            row |= {f"{size:,}": figures[size] * part.factor if size in figures else None for size in sizes}
            row["growth"] = growth(figures) if part.grows else ""
            if version == "now" and part.aim and part.aim.images in figures:
                met = figures[part.aim.images] * part.factor <= part.aim.most
                row |= {"aim": f"{part.aim.most:g} at {part.aim.images:,}", "met": "yes" if met else "no"}
            yield row


@contextmanager
def checkout(commit: str | None) -> Iterator[Path | None]:
    """That commit's files, in a folder that is deleted afterwards."""
    if commit is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        git = ["git", "-C", str(HERE.parent), "archive", commit]
        files = subprocess.run(git, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", name], input=files, check=True)
        yield Path(name)


def number(text: str) -> int:
    return int(float(text))


def main(arguments: list[str]) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=number, nargs="*", default=[10**n for n in (4, 5, 6, 7)])
    parser.add_argument("--folders", type=number, nargs="*", default=[10**4, 10**5], help="pictures")
    parser.add_argument("--before", metavar="COMMIT", help="of this repository: measured too")
    parser.add_argument("--dir", type=Path, help="where to write: 5 GB for ten million (default: a temporary folder)")
    parser.add_argument("--name", default="data")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    now: Found = {}
    before: Found = {}
    with checkout(args.before) as version, tempfile.TemporaryDirectory(dir=args.dir) as name:
        for work, counts in ((measure_folder, args.folders), (measure, args.sizes)):
            for count in counts:
                folder = Path(name) / f"{work.__name__}_{count}"
                folder.mkdir()
                work(count, folder, now, before, version)
                shutil.rmtree(folder)
    found = list(rows(now, before, sorted({*args.sizes, *args.folders})))
    settings = {"chunk": CHUNK, "read": READ, "read by workers": READ_SMALL, "before": args.before or "-"}
    write(args.name, command(), settings, found, args.out)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
