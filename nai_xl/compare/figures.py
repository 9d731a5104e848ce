"""Figures of a comparison: differences with intervals, and curves with bands over seeds.

Each is drawn for a talk and for a page: PNG on white, and SVG whose neutral colours are the page's own, so that it
stands on light and on dark. Colours are Okabe and Ito's (plots.COLOURS), and no difference is told by colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import matplotlib.font_manager
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nai_xl.compare.comparison import Arm, Comparison, Row
from nai_xl.compare.paired import NO_DIFFERENCE, ONE_SEED, Array, better_direction, critical_t
from nai_xl.compare.runs import Curve
from nai_xl.compare.wording import change, percent
from nai_xl.evals.method_figure import COLOURS, DASHES

INK, SOFT, GRID = "#1f2329", "#6b7280", "#e4e7eb"
PAGE = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--line)"}  # what an SVG takes from its page
GOOD, BAD, NEITHER = COLOURS[0], COLOURS[1], "#8a8f98"
LOOK = {  # colour and mark of a verdict that a difference is there
    "better": (GOOD, "o"), "worse": (BAD, "D"), "higher": (COLOURS[7], "^"), "lower": (COLOURS[7], "v"),
}  # fmt: skip
OTHER = (NEITHER, "s")
STYLE = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "nai_xl",
}
DPI = 160
PER_ROW = 3  # panels side by side


@dataclass(frozen=True)
class Drawn:
    """One figure in both forms; `svg` is empty for photographs."""

    png: bytes
    svg: str = ""


@contextmanager
def _canvas(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches in the common style."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04, hspace=0.04)  # type: ignore[union-attr, call-arg]
        yield figure


def _drawn(figure: Figure) -> Drawn:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, facecolor="white")
    figure.set_layout_engine("none")  # laid out once is enough
    svg = io.StringIO()
    figure.savefig(svg, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = svg.getvalue()
    for colour, variable in PAGE.items():
        text = text.replace(colour, variable)
    return Drawn(png.getvalue(), text[text.index("<svg") :])


Looks = Mapping[str, tuple[str, tuple[float, ...]]]  # label -> colour and dashes


def line_looks(found: Comparison) -> Looks:
    """Colours of the arms, in dashes where there are more of them; the baseline is neutral."""
    looks = {found.arms[0].label: (INK, DASHES[0])}
    for i, arm in enumerate(found.arms[1:]):
        looks[arm.label] = (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)])
    return looks


# --- differences ------------------------------------------------------------------------------------------------------


def forest(found: Comparison) -> Drawn | None:
    """A panel for each metric, a row for each arm: its difference to the baseline with the paired 95 % interval, and
    thin below it the interval of the same runs without pairing. None where no arm has a difference.
    """
    metrics = [metric for metric in found.metrics if any(row.effect for row in found.of(metric))]
    if not metrics:
        return None
    columns = _columns(len(metrics))
    deep = -(-len(metrics) // columns)
    names = [_broken(found.names[arm.label]) for arm in found.arms[1:]]
    rows = len(names)
    needed = 3.6 * columns + 0.115 * max(len(line) for name in names for line in name.split("\n"))
    width = max(2.2 + 4.2 * columns + (2.4 if columns == 1 else 0), needed)
    lines = max(name.count("\n") for name in names)
    with _canvas(width, deep * (1.5 + (0.62 + 0.15 * max(0, lines - 1)) * rows) + 0.9) as figure:
        axes = figure.subplots(deep, columns, sharey=True, squeeze=False)
        for axis, metric in zip(axes.flat, metrics, strict=False):
            _forest_panel(axis, metric, found.of(metric))
        for axis in axes.flat[len(metrics) :]:
            axis.set_visible(False)
        axes[0, 0].set_yticks(range(rows), names)
        axes[0, 0].set_ylim(rows - 0.4, -0.6)
        for axis in axes[:, 0]:
            axis.tick_params(axis="y", labelsize=14, labelcolor=INK)
        _title(figure, f"Difference to {found.names[found.baseline]}", _forest_key(found))
        return _drawn(figure)


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


def _title(figure: Figure, words: str, key: Sequence[tuple[Line2D, str]]) -> None:
    """A heading at the left, and what colours and marks mean below it."""
    handles, labels = [handle for handle, _ in key], [label for _, label in key]
    inches = 0.9 + 0.11 * max(map(len, labels), default=0)  # of the widest entry
    columns = max(1, min(len(key), int(figure.get_figwidth() / inches)))
    made = figure.legend(
        handles, labels, title=words, title_fontproperties={"size": 17, "weight": "bold"}, alignment="left",
        loc="outside upper left", ncols=columns, fontsize=13, handlelength=1.8, borderaxespad=0.4,
        columnspacing=1.6,
    )  # fmt: skip
    made.get_title().set_color(INK)


def _columns(panels: int) -> int:
    """Panels side by side: four stand in a square."""
    return 2 if panels == 4 else min(PER_ROW, panels)


def _forest_key(found: Comparison) -> list[tuple[Line2D, str]]:
    said = {row.verdict for row in found.rows if row.effect}
    key: list[tuple[Line2D, str]] = []
    for words in sorted(said, key=[*LOOK, NO_DIFFERENCE, ONE_SEED].index):
        colour, mark = LOOK.get(words, OTHER)
        key.append((Line2D([], [], color=colour, marker=mark, lw=5, markersize=9), words))
    if any(row.effect and row.effect.unpaired for row in found.rows):
        key.append((Line2D([], [], color=SOFT, lw=1.4), "the same runs unpaired"))
    return key


def _forest_panel(axis: Axes, metric: str, rows: Sequence[Row]) -> None:
    axis.set_title(metric, pad=10)
    axis.axvline(0, color=INK, lw=1.4, zorder=1)
    axis.grid(axis="x")
    low, high = _range(rows)
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
    good = better_direction(metric)
    axis.set_xlabel({"lower": "← better", "higher": "better →", None: ""}[good], color=SOFT)


def _range(rows: Sequence[Row]) -> tuple[float, float]:
    """Room for 0 and every paired interval; unpaired ones may double it, and are cut off beyond."""
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


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(found: Comparison) -> Drawn | None:
    """For each metric that was measured more than once: above its mean with the range over seeds, below the paired
    difference to the baseline with its 95 % interval over seeds. None where there is no such metric.
    """
    metrics = [metric for metric in found.metrics if _points(found.arms[0], metric) > 1]
    if not metrics:
        return None
    columns = _columns(len(metrics))
    deep = -(-len(metrics) // columns)
    names, looks = found.names, line_looks(found)
    seeds = max(len(arm.runs) for arm in found.arms)
    with _canvas(8.5 if columns == 1 else 1.2 + 4.9 * columns, 1.1 + 5.4 * deep) as figure:
        axes = figure.subplots(2 * deep, columns, squeeze=False, height_ratios=[3, 2] * deep, sharex=True)
        for place in range(deep * columns):
            above, below = (axes[2 * (place // columns) + half, place % columns] for half in (0, 1))
            if place >= len(metrics):
                above.set_visible(False)
                below.set_visible(False)
                continue
            _curve_panel(above, found, metrics[place], looks)
            _difference_panel(below, found, metrics[place], looks)
            if place % columns == 0:
                above.set_ylabel(f"mean and range\nof {seeds} seeds" if seeds > 1 else "one seed")
                below.set_ylabel("paired difference,\n95 % interval" if seeds > 1 else "paired difference")
        words = [f"{names[found.baseline]} (baseline)", *(names[arm.label] for arm in found.arms[1:])]
        lines = [Line2D([], [], color=colour, dashes=dashes, lw=3) for colour, dashes in looks.values()]
        _title(figure, "Over the training", list(zip(lines, words, strict=True)))
        return _drawn(figure)


def _points(arm: Arm, metric: str) -> int:
    return max((len(run.curves.get(metric, {})) for run in arm.runs.values()), default=0)


def _table(curves_: Sequence[Curve]) -> tuple[Array, Array]:
    """Steps [N] that all curves share, and their values [S, N]."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves_)))
    return np.array(steps, dtype=float), np.array([[curve[step] for step in steps] for curve in curves_])


def _curve_panel(axis: Axes, found: Comparison, metric: str, looks: Looks) -> None:
    axis.set_title(metric, pad=8)
    drawn = []
    for arm in reversed(found.arms):  # the baseline on top
        runs = [run for run in arm.runs.values() if metric in run.curves]
        if not runs:
            continue
        steps, values = _table([run.curves[metric] for run in runs])
        if not len(steps):
            continue
        x, (colour, dashes) = steps * runs[0].images_per_step, looks[arm.label]
        axis.plot(x, values.mean(0), color=colour, dashes=dashes, lw=2.4)
        faint = min(0.18, 0.7 / len(found.arms))  # many bands over each other must not hide the lines
        axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=faint, lw=0)
        drawn.append(values[np.isfinite(values)])
    every = np.concatenate(drawn) if drawn else np.zeros(0)
    if len(every) and every.min() > 0 and every.max() > 5 * every.min():
        axis.set_yscale("log")
    axis.grid(axis="y")


def _difference_panel(axis: Axes, found: Comparison, metric: str, looks: Looks) -> None:
    baseline = found.arms[0]
    axis.axhline(0, color=INK, lw=1.8)
    inner = []
    for arm in found.arms[1:]:
        seeds = [seed for seed in arm.runs if seed in baseline.runs]
        pairs = [(arm.runs[seed], baseline.runs[seed]) for seed in seeds]
        pairs = [pair for pair in pairs if all(metric in run.curves for run in pair)]
        if not pairs:
            continue
        both = [run.curves[metric] for pair in pairs for run in pair]
        steps, values = _table(both)
        if not len(steps):
            continue
        difference = values[0::2] - values[1::2]
        mean, (colour, dashes) = difference.mean(0), looks[arm.label]
        x = steps * pairs[0][0].images_per_step
        axis.plot(x, mean, color=colour, dashes=dashes, lw=2.2)
        if len(pairs) > 1:
            half = critical_t(len(pairs) - 1) * difference.std(0, ddof=1) / np.sqrt(len(pairs))
            axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.16, lw=0)
        inner.append(mean[np.isfinite(mean)])
    late = np.concatenate([mean[len(mean) // 4 :] for mean in inner]) if inner else np.zeros(0)
    if len(late):  # the first quarter may be wild, and an interval of two seeds may be endless
        low, high = min(late.min(), 0.0), max(late.max(), 0.0)
        room = (high - low) or 1e-12
        axis.set_ylim(low - 0.6 * room, high + 0.6 * room)
    axis.grid(axis="y")
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.tick_params(labelbottom=True)  # panels below hide it otherwise
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"))
    counted = any(run.images for arm in found.arms for run in arm.runs.values())
    axis.set_xlabel("images seen" if counted else "optimizer steps")
