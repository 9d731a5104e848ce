"""The table of combinations: a row for each, with the numbers of its diagnosis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nai_xl.diffusion.diagnosis import Diagnosis
from nai_xl.inspect.combinations import Combination
from nai_xl.task.objective import headline


def table(combinations: Sequence[Combination]) -> Table:
    """A row for each combination: its swept values, then its numbers or the word "refused"."""
    choices, swept = combinations[0].choices, combinations[0].swept
    made = Table(
        title=headline(choices, swept),
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1),
        caption="0-, ..., 900-: per cent of the loss weight (weight x density) in each tenth of the timesteps",
        caption_justify="left",
    )
    for key in swept:
        made.add_column(key, style="cyan", no_wrap=True, vertical="bottom")
    for heading in ("last\nsigma/alpha", "log-SNR\nfrom, to", *_tenths(combinations), "last\nweight", "mean\nweight"):
        made.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for c in combinations:
        made.add_row(*map(Text, c.swept.values()), *(numbers(c.diagnosis) if c.diagnosis else ["refused"]))
    return made


def show(made: Table) -> None:
    """Print a table at its natural width, however narrow the terminal or pipe is."""
    Console(highlight=False, width=Console(width=1000).measure(made).maximum).print(made)


def numbers(d: Diagnosis) -> Iterator[str]:
    """The cells of one row."""
    yield f"{d.noise[-1]:.3g}"
    yield f"{d.log_snr[0]:.1f}, {d.log_snr[-1]:.1f}"
    yield from (_percent(float(share)) for share in d.deciles)
    yield f"{d.weight[-1]:.3g}"
    yield f"{d.mean_weight:.3g}"


def _tenths(combinations: Sequence[Combination]) -> list[str]:
    """Where each tenth of the timesteps begins: as a timestep, or as a share where tables differ in length."""
    lengths = {len(c.diagnosis) for c in combinations if c.diagnosis}
    if len(lengths) > 1:
        return [f"{10 * i} %-" for i in range(10)]
    length = next(iter(lengths), 0)
    return [f"{-(-length * i // 10)}-" for i in range(10)]


def _percent(share: float) -> str:
    """Two digits, and no exponents: 12, 3.4, 0.36, 0.01."""
    value = 100 * share
    digits = 0 if value >= 9.95 else 1 if value >= 0.995 else 2
    return "<0.01" if 0 < value < 0.005 else f"{value:.{digits}f}" if value else "0"
