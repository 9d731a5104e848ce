"""What a person sees: a table at the start, one line of progress, and where everything lies at the end."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from nai_xl.redact import redacted


class Screen:
    """Speaks on the first rank and is silent on the others."""

    def __init__(self, *, silent: bool):
        self.console = Console(quiet=silent, highlight=False, soft_wrap=True)
        self.silent = silent
        self.bar: tqdm | None = None  # type: ignore[type-arg]

    def say(self, *lines: str) -> None:
        for line in lines:
            self.console.print(redacted(line), markup=False)

    def show(self, content: RenderableType) -> None:
        """Print something of rich's, above the progress line if that is open."""
        live = self.bar is not None and self.console.is_terminal
        if self.bar is not None and live:
            self.bar.clear()
        self.console.print(content, soft_wrap=False)
        if self.bar is not None and live:
            self.bar.refresh()

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        table = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2)
        )
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, Text(redacted(value)))  # a path may hold [brackets], which are no markup
        self.console.print(table)

    def begin(self, start: int, steps: int) -> None:
        """Open the progress line. Without a terminal it is printed anew every ten seconds."""
        live = self.console.is_terminal
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=self.silent,
            mininterval=0.5 if live else 10,
            dynamic_ncols=live,
            bar_format="{percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}",
        )

    def report(self, step: int, values: Mapping[str, float]) -> None:
        if self.bar is not None and "train/loss" in values:
            loss, speed = values["train/loss"], values["perf/images_per_second"]
            mfu = f", MFU {values['perf/mfu']:.0%}" if "perf/mfu" in values else ""
            self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s{mfu}", refresh=False)
            self.bar.update(step - self.bar.n)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
