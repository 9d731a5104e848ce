"""What a person sees of a sweep: a line for each arm under way, one for each that ended, and a table at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nai_xl.redact import redacted

COLOURS = {"FINISHED": "green", "FAILED": "red", "STOPPED": "yellow"}


@dataclass(frozen=True)
class Row:
    """One arm at the end. `again`: the command that trains it alone, where it is not finished."""

    arm: str
    status: str
    steps: int
    seconds: float
    value: float | None  # of the metric that the table shows
    path: Path
    error: str | None = None
    again: str = ""


class Board:
    """Says which arms begin and end. On a terminal it also shows how far each running arm is."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.live: Live | None = None

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, line: str) -> None:
        self.console.print(redacted(line), markup=False)

    def watch(self, running: Sequence[tuple[str, float, Path, int]]) -> None:
        """Show the arms under way: name, seconds, log, the log's length when they began."""
        if self.live:
            lines = [f"{spent(seconds)}  {name}  {progress(tail(log, since))}" for name, seconds, log, since in running]
            self.live.update(Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines)), refresh=True)


def spent(seconds: float) -> str:
    """'1:02:03', or '02:03' within the hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes:02}:{rest:02}"


def progress(log: str) -> str:
    """The last state of the last progress bar in a program's output."""
    bars = [piece.strip() for piece in re.split(r"[\r\n]", log) if re.search(r"\d%\s*\|", piece)]
    return bars[-1] if bars else "starts"


def tail(log: Path, since: int = 0, size: int = 4000) -> str:
    """The last `size` bytes of a file, or less if fewer were written after byte `since`; '' for no file."""
    try:
        with log.open("rb") as file:
            file.seek(max(since, log.stat().st_size - size))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def print_table(title: str, rows: Sequence[Row], metric: str | None = "train/loss") -> None:
    """Print a table of all arms, as wide as it needs, and then what to do about those that failed. `metric`: what the
    arms' values are of; None leaves the column out.
    """
    made = Table(box=None, padding=(0, 1), title=Text(title, style="bold"), title_justify="left")
    made.add_column("arm", style="cyan", no_wrap=True)
    made.add_column("status", no_wrap=True)
    for heading in ("steps", "time", *([metric] if metric else [])):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("run", no_wrap=True)
    for row in rows:
        values = ["" if row.value is None else f"{row.value:.4f}"] if metric else []
        status = Text(row.status, style=COLOURS.get(row.status, ""))
        time = spent(row.seconds) if row.seconds else ""
        # Text, because rich would take the [sdpa] of memory=[sdpa] in a string for markup and hide it
        made.add_row(Text(row.arm), status, f"{row.steps or ''}", time, *values, Text(str(row.path)))
    width = Console(width=1000).measure(made).maximum
    Console(highlight=False, width=max(width, len(title))).print(made)
    plain = Console(highlight=False, soft_wrap=True)
    for row in rows:
        if row.status == "FAILED":
            plain.print(redacted(f"\nFAILED {row.arm}: {row.error}"), markup=False)
            plain.print(f"  log    {row.path / 'log.txt'}", markup=False)
            plain.print(redacted(f"  again  {row.again}"), markup=False)
