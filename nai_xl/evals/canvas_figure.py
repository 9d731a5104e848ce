"""The figure of the canvases: how many images each has, and how much of them is cut away."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from nai_xl.data.report import Report

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#888888"  # Okabe and Ito's


def canvases(report: Report, skipped: int) -> Image.Image:
    """Three panels over the canvases that are used, from tall to wide: their shapes, images, and the mean share of an
    image that is cut away.
    """
    count = len(report.buckets)
    width = min(max(7.5, 2.5 + 0.42 * count), 26)
    figure = Figure(figsize=(width, 6.4), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    shapes, images, cut = figure.subplots(3, 1, sharex=True, height_ratios=(0.55, 2, 1))
    figure.suptitle(_title(report, skipped), fontsize=11, fontweight="bold", x=0.01, ha="left")
    x = np.arange(count)
    images.bar(x, report.counts, width=0.72, color=BLUE)
    images.set_ylabel("images")
    images.yaxis.set_major_locator(MaxNLocator(integer=True))
    if report.counts.max() > 100 * np.median(report.counts):
        images.set_yscale("log")
    for at, number in enumerate(report.counts.tolist()):
        turned = 90 if count > 12 and report.counts.max() > 999 else 0
        images.annotate(
            f"{number:,}",
            (at, number),
            (0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
            rotation=turned,
        )
    images.margins(y=0.16)
    around = max(0.0, (5 - count) / 2)  # one bar alone would be a wall
    images.set_xlim(-0.6 - around, count - 0.4 + around)
    cut.bar(x, 100 * report.cuts, width=0.72, color=ORANGE)
    cut.axhline(100 * report.cut, color=GREY, linewidth=1, linestyle=(0, (4, 2)))
    cut.set_ylim(0, max(1, 105 * report.cuts.max()))
    cut.set_ylabel("cut away, %")
    cut.set_xticks(x, [bucket.name for bucket in report.buckets], rotation=90 if count > 8 else 0, fontsize=8)
    cut.set_xlabel("canvas, width x height in pixels; dashed: the mean of all images")
    for axis in (images, cut):
        axis.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(color=GREY)
    figure.draw_without_rendering()  # sizes the panels
    _shapes(shapes, report)
    figure.canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _title(report: Report, skipped: int) -> str:
    images = f"{report.images:,} {'image' if report.images == 1 else 'images'}"
    canvases = f"{len(report.buckets)} {'canvas' if len(report.buckets) == 1 else 'canvases'}"
    words = f"{images} on {canvases}, {report.cut:.1%} cut away in the mean"
    words += f"\n{report.enlarged:,} enlarged"
    words += f" (up to {report.largest_factor:.3g} times, {report.much:,} more than twofold)" if report.enlarged else ""
    return f"{words}; {report.most:,} lose more than half; {skipped:,} left out"


def _shapes(axis: Axes, report: Report) -> None:
    """The canvases as boxes, all at one scale. `axis` has its final size."""
    axis.set_ylim(-0.55, 0.55)
    axis.axis("off")
    panel = axis.get_window_extent()
    room, high = panel.width / np.ptp(axis.get_xlim()), panel.height / np.ptp(axis.get_ylim())  # of a unit, in dots
    scale = min(high / max(b.height for b in report.buckets), 0.86 * room / max(b.width for b in report.buckets))
    for at, bucket in enumerate(report.buckets):
        width, height = scale * bucket.width / room, scale * bucket.height / high
        axis.add_patch(Rectangle((at - width / 2, -height / 2), width, height, facecolor="#cfe3f1", edgecolor=BLUE))
