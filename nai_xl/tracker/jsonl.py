"""Where a run's numbers and pictures go. Two files in the run directory are the record that every tracker keeps:

metrics.jsonl   a line a report: {"step", "time" in ms, name: value, ...}
outbox.jsonl    a line for everything else that happened, in its order: {"time", "kind": "params" | "tags" | "figure" |
                "artifact" | "status", ...}; pictures and files by their place
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from nai_xl.errors import with_kind
from nai_xl.files import write_atomically

ERROR_LENGTH = 5000  # characters kept of an error's message


class NoTracker:
    """Reports nothing: for every rank but the first, and the base of the others."""

    def __enter__(self) -> NoTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        pass

    def params(self, flat: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        pass

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def figure(self, name: str, step: int, image: Image.Image) -> None:
        pass

    def artifact(self, path: Path) -> None:
        pass

    def where(self) -> list[str]:
        """Lines that tell a person where to look."""
        return []


class Journal:
    """A file of JSON objects, one a line, that is only appended to. Its bytes never move, so a reader can go on from
    the byte where it stopped. A line torn by a crash is left out.
    """

    def __init__(self, path: Path):
        self.path = path

    def mend(self) -> None:
        """To be called by the writer before it appends: a torn last line would spoil the next one."""
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as file:
                file.write("\n")

    def append(self, **row: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def after(self, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every whole row that begins at byte `offset` or later, with the byte where it ends."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset if offset <= self.path.stat().st_size else 0)
            end = file.tell()
            for line in file:
                end += len(line)
                if line.endswith(b"\n"):
                    try:
                        yield end, json.loads(line)
                    except ValueError:
                        continue

    def rows(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self.after())


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def outbox_of(run_dir: Path) -> Journal:
    return Journal(run_dir / "outbox.jsonl")


def metrics_of(run_dir: Path) -> Journal:
    return Journal(run_dir / "metrics.jsonl")


def note_end(run_dir: Path, status: str, error: str = "") -> None:
    """Record how a run ended that could not do so itself, such as one that was killed. status: FINISHED, FAILED or
    KILLED.
    """
    outbox_of(run_dir).append(time=now(), kind="status", status=status, error=error[:ERROR_LENGTH])


class JsonlTracker(NoTracker):
    """Keeps the record of a run in `run_dir`, each step once however often the run was resumed; pictures in
    `run_dir`/<name>/step_00000100.png.
    """

    changes_weights: ClassVar[bool] = False

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.metrics, self.outbox = metrics_of(run_dir), outbox_of(run_dir)
        self.metrics.mend()
        self.outbox.mend()
        self.last = max((int(row["step"]) for row in self.metrics.rows()), default=0)
        self.figures = {(row["name"], row["step"]) for row in self.outbox.rows() if row["kind"] == "figure"}

    def __enter__(self) -> JsonlTracker:
        self.outbox.append(time=now(), kind="status", status="RUNNING", error="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        told = with_kind(error) if error is not None and status == "FAILED" else ""
        note_end(self.run_dir, status, told)

    def params(self, flat: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        content = {"params": dict(flat), "tags": dict(tags)}
        text = json.dumps(content, indent=2, default=str)
        write_atomically(self.run_dir / "params.json", lambda path: path.write_text(text))
        self.outbox.append(time=now(), kind="tags", tags=dict(tags))
        self.outbox.append(time=now(), kind="params", file="params.json")

    def is_new(self, step: int) -> bool:
        """False for a step that an earlier session of this run reported."""
        return step > self.last

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.is_new(step):
            self.metrics.append(step=step, time=now(), **values)

    def figure(self, name: str, step: int, image: Image.Image) -> None:
        path = self.run_dir / name / f"step_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        if (name, step) not in self.figures:
            self.figures.add((name, step))
            self.outbox.append(time=now(), kind="figure", name=name, step=step, file=f"{name}/{path.name}")

    def artifact(self, path: Path) -> None:
        inside = path.absolute().is_relative_to(self.run_dir.absolute())
        place = path.absolute().relative_to(self.run_dir.absolute()) if inside else path.absolute()
        self.outbox.append(time=now(), kind="artifact", file=place.as_posix())

    def where(self) -> list[str]:
        return [f"metrics      {self.metrics.path}"]
