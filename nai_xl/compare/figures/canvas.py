"""What the figures have in common: their style, a heading, and how they are saved.

Each is drawn for a talk and for a page: PNG on white, and SVG whose neutral colours are the page's own, so that it can
be read on light and on dark. Colours are Okabe and Ito's (evals.method_figure.COLOURS), and no difference is told by
colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import matplotlib.font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, SOFT, GRID = "#1f2329", "#6b7280", "#e4e7eb"
PAGE = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--line)"}  # colours that an SVG takes from its page
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
    """One figure in both forms; `svg` is empty for pictures made of pixels."""

    png: bytes
    svg: str = ""


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of this size in inches, in the common style."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04, hspace=0.04)  # type: ignore[union-attr, call-arg]
        yield figure


def save(figure: Figure) -> Drawn:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, facecolor="white")
    figure.set_layout_engine("none")  # laid out once is enough
    svg = io.StringIO()
    figure.savefig(svg, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = svg.getvalue()
    for colour, variable in PAGE.items():
        text = text.replace(colour, variable)
    return Drawn(png.getvalue(), text[text.index("<svg") :])


def heading(figure: Figure, words: str, key: Sequence[tuple[Line2D, str]]) -> None:
    """Put a heading at the left, and below it what colours and marks mean."""
    handles, labels = [handle for handle, _ in key], [label for _, label in key]
    inches = 0.9 + 0.11 * max(map(len, labels), default=0)  # of the widest entry
    side_by_side = max(1, min(len(key), int(figure.get_figwidth() / inches)))
    made = figure.legend(
        handles, labels, title=words, title_fontproperties={"size": 17, "weight": "bold"}, alignment="left",
        loc="outside upper left", ncols=side_by_side, fontsize=13, handlelength=1.8, borderaxespad=0.4,
        columnspacing=1.6,
    )  # fmt: skip
    made.get_title().set_color(INK)


def columns(panels: int) -> int:
    """How many of so many panels stand side by side. Four make a square."""
    return 2 if panels == 4 else min(PER_ROW, panels)
