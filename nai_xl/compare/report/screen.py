"""The comparison on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nai_xl.compare.comparison import Comparison
from nai_xl.compare.power import needed
from nai_xl.compare.wording import (
    about,
    change,
    contrast_cells,
    interval,
    narrower,
    number,
    p_value,
    percent,
    remarks,
    said,
)

SHADES = {"better": "bold blue", "worse": "bold red", "higher": "bold", "lower": "bold", "equal": "bold green"}


def table(found: Comparison) -> Table:
    """A row for each metric and arm."""
    made = Table(box=None, padding=(0, 1), title=Text(about(found), style="bold"), title_justify="left")
    made.add_column("arm", no_wrap=True)
    made.add_column("", no_wrap=True)
    for heading in ("mean", "difference", "", "95 % interval", "p (Holm)", "narrower by pairing", "seeds x items"):
        made.add_column(heading, justify="right", no_wrap=True)
    for metric in found.metrics:
        rows = found.of(metric)
        made.add_row(Text(metric, style="bold cyan"))
        made.add_row(Text(found.names[found.baseline]), "baseline", number(found.baseline_mean(metric)))
        for row in rows:
            e = row.effect
            made.add_row(
                Text(found.names[row.arm]),
                Text(said(row), style=SHADES.get(row.verdict, "")),
                number(row.mean),
                change(e.difference) if e else "",
                percent(row),
                interval(row) if e else "",
                p_value(row.p_holm) if e else "",
                narrower(row) if e else "",
                f"{e.seeds} x {e.items}" if e else "",
            )
    return made


def show(found: Comparison, files: Sequence[Path]) -> None:
    """Print the question, the table at its natural width, the remarks, and the path of the report."""
    console = Console(highlight=False, soft_wrap=True)
    if found.asked.question:
        console.print(found.asked.question, markup=False, style="bold")
    made = table(found)
    Console(highlight=False, width=Console(width=1000).measure(made).maximum).print(made)
    console.print()
    if found.contrasts:
        console.print("main effects and interactions", style="bold")
        for one in found.contrasts:
            console.print("  ".join(contrast_cells(one)), markup=False)
        console.print()
    for line in [*found.notes, *remarks(found), *needed(found)]:
        console.print(f"- {line}", markup=False)
    console.print(f"report: {files[0]}", markup=False)
