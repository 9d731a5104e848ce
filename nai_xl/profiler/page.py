"""A profile on one screen."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nai_xl.profiler.trace import COMMUNICATION, COMPUTE, HOST, IDLE, MEMORY, WAIT, Summary

COSTLIEST = 10
WIDTH, BAR = 100, 20
COLOURS = {COMPUTE: "green", MEMORY: "yellow", COMMUNICATION: "magenta", IDLE: "red", HOST: "red", WAIT: "red"}
MEANS = {
    IDLE: "the device stands still, waiting for the host",
    HOST: "Python, autograd and views between operators",
    WAIT: "for the next batch",
}


@dataclass(frozen=True)
class Page:
    """A summary for people."""

    found: Summary
    findings: list[str]
    step: int  # the last one recorded
    images: int  # of this process, in all recorded steps
    peak_gib: float
    trace: Path

    def rendered(self) -> RenderableType:
        found = self.found
        first = self.step - found.steps + 1
        speed = self.images / (found.steps * found.seconds)
        heading = Text.assemble(
            (f"profile of steps {first} to {self.step}", "bold"),
            f"   {1000 * found.seconds:,.0f} ms a step, {speed:,.1f} images/s with the profiler on, "
            f"peak memory {self.peak_gib:.2f} GiB",
        )
        said = [Text(f"- {finding}") for finding in self.findings]
        trace = Text(f"trace, to be opened at https://ui.perfetto.dev: {self.trace}", style="dim", overflow="fold")
        gap = Text()
        return Group(
            heading, gap, self._shares(), gap, self._costs(), gap, Text(self._counts()), gap, *said, gap, trace
        )

    def _shares(self) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True, min_width=BAR)
        table.add_column(style="dim")
        for bound, share in self.found.bounds.items():
            if share or bound != COMMUNICATION:
                bar = Text("█" * round(BAR * share), style=COLOURS[bound])
                table.add_row(bound, f"{share:.1%}", bar, MEANS.get(bound) or self._kinds(bound))
        return table

    def _kinds(self, bound: str) -> str:
        shares = {kind: share for (of, kind), share in self.found.kinds.items() if of == bound}
        return ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items() if share >= 0.0005)

    def _costs(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("costliest operators", overflow="fold")
        for name in ("ms/step", "share", "calls/step"):
            table.add_column(name, justify="right", min_width=len(name))
        table.add_column("kind", min_width=len("communication"))
        for cost in self.found.costs[:COSTLIEST]:
            share = cost.ms / 1000 / self.found.seconds
            table.add_row(
                cost.name.removeprefix("aten::"),
                f"{cost.ms:,.2f}",
                f"{share:.1%}",
                f"{cost.calls:,.0f}",
                Text(cost.kind, COLOURS[cost.bound]),
            )
        return table

    def _counts(self) -> str:
        found = self.found
        parts = [f"{found.operators:,.0f} operators"]
        if found.kernels:
            parts.append(f"{found.kernels:,.0f} kernels")
        parts.append(f"{_places(found.reads)} item()" + _where(found.reads))
        if found.kernels:
            parts.append(f"{_places(found.waits)} waits of the host for the device" + _where(found.waits))
        return "a step: " + "; ".join(parts)

    def text(self) -> str:
        """Without colours."""
        with io.StringIO() as file:
            Console(file=file, width=WIDTH, highlight=False).print(self.rendered())
            return file.getvalue()


def _places(counts: Mapping[str, float]) -> str:
    return f"{sum(counts.values()):,.1f}".removesuffix(".0")


def _where(counts: Mapping[str, float]) -> str:
    return f" (most in {next(iter(counts)).removeprefix('aten::')})" if counts else ""
