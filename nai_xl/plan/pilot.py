"""What a question would cost: the seeds that a difference takes, by an earlier sweep's spread, and their hours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from nai_xl.compare.answered import answered
from nai_xl.compare.arguments import Request
from nai_xl.compare.comparison import Comparison
from nai_xl.compare.power import SEEDS, Power, power
from nai_xl.compare.selection import select
from nai_xl.compare.wording import in_words
from nai_xl.engine.gpus import Gpu
from nai_xl.errors import UserError
from nai_xl.plan.run_plan import Machines, RunPlan


def pilot_of(sweep: str, output_dir: Path, detect: str) -> Comparison:
    """The comparison of an earlier sweep. Raises UserError when there is none of that name."""
    found = answered(select(Request({"sweep": sweep, "output_dir": str(output_dir), "detect": detect})), recorded=False)
    if not power(found):
        raise UserError(f"--pilot {sweep}: its arms share no two seeds, and one has no spread; train another seed")
    return found


def pilot_table(pilot: Comparison, hours: float | None = None) -> Table:
    """The difference that so many seeds show, a row for each metric and arm.

    If a difference is to be detected, the seeds that it takes, and with the `hours` of a run those of arm and baseline.
    """
    wanted = pilot.asked.detect
    title = f"seeds, by the spread of {pilot.asked.name}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    for heading in ("metric", "arm", *(f"{n} seeds show" for n in SEEDS)):
        table.add_column(heading, justify="left" if heading in ("metric", "arm") else "right", no_wrap=True)
    if wanted:
        table.add_column(f"{in_words(wanted)} takes", justify="right", no_wrap=True)
        if hours is not None:
            table.add_column("hours", justify="right", no_wrap=True)
    for one in power(pilot, wanted):
        table.add_row(one.metric, pilot.names[one.arm], *_cells(one, wanted, hours))
    return table


def _cells(one: Power, wanted: str, hours: float | None) -> Iterator[str]:
    yield from (one.size(n) for n in SEEDS)
    if wanted:
        yield f"{one.wanted} seeds" if one.wanted else "more items" if one.items > 1 else "-"
        if hours is not None:
            yield f"{2 * one.wanted * hours:,.2f}" if one.wanted else "-"


def hours_of_a_run(plan: RunPlan, gpus: Sequence[Gpu], machines: Machines) -> float | None:
    """Of one arm with one seed on the one card asked for; None without a card, or where no speed is expected."""
    speed = plan.speed(gpus[0], machines) if len(gpus) == 1 else None
    if speed is None or plan.images is None:
        return None
    return plan.images / speed.images_per_second / 3600
