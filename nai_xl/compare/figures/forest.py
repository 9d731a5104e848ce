"""The differences to the baseline with their intervals, as a forest plot."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nai_xl.compare.comparison import Comparison
from nai_xl.compare.figures.canvas import INK, SOFT, Drawn, canvas, columns, heading, save
from nai_xl.compare.judging.rows import Row
from nai_xl.compare.judging.verdicts import (
    EQUAL,
    IDENTICAL,
    NO_VERDICT,
    ONE_SEED,
    TWO_SEEDS,
    UNDECIDED,
    better_direction,
)  # fmt: skip
from nai_xl.compare.wording import change, percent
from nai_xl.evals.method_figure import COLOURS

GOOD, BAD, NEITHER = COLOURS[0], COLOURS[1], "#8a8f98"
LOOK = {  # colour and mark of a verdict that there is a difference
    "better": (GOOD, "o"), "worse": (BAD, "D"), "higher": (COLOURS[7], "^"), "lower": (COLOURS[7], "v"),
    EQUAL: (COLOURS[2], "o"),
}  # fmt: skip
OTHER = (NEITHER, "s")


def forest(found: Comparison) -> Drawn | None:
    """A panel for each metric, a row for each arm; None if no arm has a difference.

    Each row shows the difference to the baseline with the paired 95 % interval and, thin below it, the interval that
    the same runs have without pairing. Differences within the margin of equality are shaded.
    """
    metrics = [metric for metric in found.metrics if any(row.effect for row in found.of(metric))]
    if not metrics:
        return None
    wide = columns(len(metrics))
    deep = -(-len(metrics) // wide)
    names = [_broken(found.names[arm.label]) for arm in found.arms[1:]]
    rows = len(names)
    needed = 3.6 * wide + 0.115 * max(len(line) for name in names for line in name.split("\n"))
    width = max(2.2 + 4.2 * wide + (2.4 if wide == 1 else 0), needed)
    lines = max(name.count("\n") for name in names)
    with canvas(width, deep * (1.5 + (0.62 + 0.15 * max(0, lines - 1)) * rows) + 0.9) as figure:
        axes = figure.subplots(deep, wide, sharey=True, squeeze=False)
        for axis, metric in zip(axes.flat, metrics, strict=False):
            _panel(axis, found, metric)
        for axis in axes.flat[len(metrics) :]:
            axis.set_visible(False)
        axes[0, 0].set_yticks(range(rows), names)
        axes[0, 0].set_ylim(rows - 0.4, -0.6)
        for axis in axes[:, 0]:
            axis.tick_params(axis="y", labelsize=14, labelcolor=INK)
        heading(figure, f"Difference to {found.names[found.baseline]}", _key(found))
        return save(figure)


def _broken(name: str, width: int = 36) -> str:
    """An arm's name in lines of about `width` characters, broken before a '+'."""
    lines = [""]
    for part in name.split(" + "):
        joined = f"{lines[-1]} + {part}" if lines[-1] else part
        if len(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(f"+ {part}")
    return "\n".join(lines)


def _key(found: Comparison) -> list[tuple[Line2D, str]]:
    said = {row.verdict for row in found.rows if row.effect}
    key: list[tuple[Line2D, str]] = []
    for words in sorted(said, key=[*LOOK, IDENTICAL, UNDECIDED, TWO_SEEDS, ONE_SEED, NO_VERDICT].index):
        colour, mark = LOOK.get(words, OTHER)
        key.append(
            (
                Line2D([], [], color=colour, marker=mark, lw=5, markersize=9),
                "equal within the margin" if words == EQUAL else words,
            )
        )
    if any(row.effect and row.effect.unpaired for row in found.rows):
        key.append((Line2D([], [], color=SOFT, lw=1.4), "the same runs unpaired"))
    return key


def _panel(axis: Axes, found: Comparison, metric: str) -> None:
    rows = found.of(metric)
    axis.set_title(metric, pad=10)
    axis.axvline(0, color=INK, lw=1.4, zorder=1)
    axis.grid(axis="x")
    low, high = _range(rows)
    if (within := _margin(rows)) is not None:
        axis.axvspan(-within, within, color=LOOK[EQUAL][0], alpha=0.12, lw=0, zorder=0)
    for place, row in enumerate(rows):
        if row.effect is None:
            axis.annotate(
                row.verdict, (0.02, place), xycoords=("axes fraction", "data"), color=SOFT, va="center", style="italic"
            )
            continue
        _interval(axis, place, row, low, high)
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    good = better_direction(metric, found.directions)
    axis.set_xlabel({"lower": "← better", "higher": "better →", None: ""}[good], color=SOFT)


def _margin(rows: Sequence[Row]) -> float | None:
    """The widest of the rows' margins in the metric's units; None if no row has one."""
    sizes = [size for row in rows if (size := row.margin_in_units) is not None]
    return max(sizes, default=None)


def _range(rows: Sequence[Row]) -> tuple[float, float]:
    """The ends of the axis: room for 0 and all paired intervals. Unpaired ones may double it and are cut off there."""
    effects = [row.effect for row in rows if row.effect]
    ends = [0.0, *(end for e in effects for end in (e.difference, e.low, e.high) if end is not None)]
    low, high = min(ends), max(ends)
    room = (high - low) or max(abs(low), 1e-12)
    wide = [
        end for e in effects if e.unpaired is not None for end in (e.difference - e.unpaired, e.difference + e.unpaired)
    ]
    low, high = max(min([low, *wide]), low - room / 2), min(max([high, *wide]), high + room / 2)
    return low - 0.08 * room, high + 0.08 * room


def _interval(axis: Axes, place: int, row: Row, low: float, high: float) -> None:
    e = row.effect
    assert e is not None
    colour, mark = LOOK.get(row.verdict, OTHER)
    if e.unpaired is not None:
        ends = [e.difference - e.unpaired, e.difference + e.unpaired]
        axis.plot(ends, [place + 0.22] * 2, color=SOFT, lw=1.4, solid_capstyle="butt", zorder=2)
        for end, arrow in zip(ends, "<>", strict=True):
            cut = not low <= end <= high
            at = low if end < low else high if end > high else end
            axis.plot([at], [place + 0.22], marker=arrow if cut else "|", color=SOFT, ms=6, clip_on=False, zorder=2)
    if e.low is not None and e.high is not None:
        axis.plot([e.low, e.high], [place] * 2, color=colour, lw=5, solid_capstyle="round", zorder=3)
    axis.plot([e.difference], [place], mark, color=colour, ms=10, zorder=4)
    label = percent(row) or change(e.difference)
    axis.annotate(
        label, (1.05, place), xycoords=("axes fraction", "data"), ha="left", va="center", annotation_clip=False,
        fontweight="bold" if row.verdict in LOOK else "normal", color=INK if row.verdict in LOOK else SOFT,
    )  # fmt: skip
