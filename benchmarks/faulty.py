"""A run that is hurt from outside: its processes found and killed, and what it left compared with another's."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

MARK = "NAI_XL_HURT"  # in the environment of every process of one start, whatever has become of its parent
LAUNCHER = "torch.distributed.run"


@dataclass
class Start:
    """One start of `python -m nai_xl.train` in `folder`, on `world` processes of torchrun or in this one's child."""

    folder: Path
    overrides: Sequence[str]
    world: int = 1
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", LAUNCHER, "--standalone", f"--nproc-per-node={self.world}"] if self.world > 1 else []
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "nai_xl.train", *self.overrides],
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.token},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def alive(self) -> list[psutil.Process]:
        """Every process that this start has begun, directly or not, and that still runs."""
        return [one for one in psutil.process_iter() if self._is_mine(one)]

    def _is_mine(self, one: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return one.environ().get(MARK) == self.token and one.status() != psutil.STATUS_ZOMBIE
        return False

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank; those of a loader or of torch's own helpers are left out."""
        found: dict[int, psutil.Process] = {}
        for one in self.alive():
            with suppress(psutil.Error):
                words = one.cmdline()
                parent = one.parent()
                if "nai_xl.train" in words and LAUNCHER not in words and self._is_worker(parent):
                    found[int(one.environ().get("RANK", "0"))] = one
        return [found[rank] for rank in sorted(found)]

    def _is_worker(self, parent: psutil.Process | None) -> bool:
        """Whether a child of `parent` is a rank, and no fork of one."""
        if parent is None or not self._is_mine(parent):
            return True
        return LAUNCHER in parent.cmdline()

    def clear(self, within: float) -> list[str]:
        """Wait until nothing of this start runs any more. The command lines of what still does after `within` seconds:
        orphans, which are killed then.
        """
        until = time.monotonic() + within
        while (left := self.alive()) and time.monotonic() < until:
            self.process.poll()
            time.sleep(0.2)
        told = []
        for one in left:
            with suppress(psutil.Error):
                told.append(" ".join(one.cmdline()))
                one.kill()
        return told


def run_of(folder: Path) -> Path | None:
    """The only run directory below `folder`."""
    found = [path for path in (folder / "outputs").glob("*") if (path / "config.yaml").is_file()]
    return found[0] if found else None


def last_step(folder: Path) -> int:
    """The last step that the run has reported."""
    run = run_of(folder)
    rows = reported(run) if run else []
    return max((row["step"] for row in rows), default=0)


def reported(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def differences(hurt: Path, whole: Path) -> list[str]:
    """What a run that was hurt has otherwise than an undisturbed one: numbers to the bit, pictures, weights, files."""
    return [*_rows(hurt, whole), *_items(hurt, whole), *_files(hurt, whole)]


def _rows(hurt: Path, whole: Path) -> list[str]:
    mine, other = reported(hurt), reported(whole)
    steps = [row["step"] for row in mine]
    found = [f"step {step} is there {steps.count(step)} times" for step in sorted(set(steps)) if steps.count(step) > 1]
    found += [f"step {row['step']} is missing" for row in other if row["step"] not in steps]
    by_step = {row["step"]: row for row in mine}
    for row in other:
        found += [
            f"step {row['step']}: {name} is {by_step[row['step']].get(name)}, undisturbed {value}"
            for name, value in row.items()
            if name != "time" and not name.startswith("perf/") and row["step"] in by_step
            and by_step[row["step"]].get(name) != value
        ]  # fmt: skip
    return found


def _items(hurt: Path, whole: Path) -> list[str]:
    def values(path: Path) -> list[Any]:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(row["step"], row["values"]) for row in rows]

    return [
        f"items/{path.name} differs"
        for path in sorted((whole / "items").glob("*.jsonl"))
        if not (hurt / "items" / path.name).is_file() or values(hurt / "items" / path.name) != values(path)
    ]


def _files(hurt: Path, whole: Path) -> list[str]:
    mine, other = _names(hurt), _names(whole)
    found = [f"stray file {name}" for name in sorted(mine - other)] + [
        f"no file {name}" for name in sorted(other - mine)
    ]
    content = (name for name in sorted(mine & other) if name.endswith((".png", ".safetensors")))
    return found + [f"{name} differs" for name in content if _digest(hurt / name) != _digest(whole / name)]


def _names(run: Path) -> set[str]:
    """All files but those of checkpoints before the newest: an orderly stop makes one at a step of its own."""
    files = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    newest = max((path.parts[1] for path in files if path.parts[0] == "checkpoints"), default="")
    return {str(path) for path in files if path.parts[0] != "checkpoints" or path.parts[1] == newest}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
