"""The figure of the method: how noisy each timestep is, and how much it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

from nai_xl.diffusion.diagnosis import Diagnosis

# Okabe and Ito's colours, told apart by the colour-blind, and four more for large sweeps
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #7B4B2A #6A3D9A #8A8A00 #E7298A".split()
SHARED = "#444444"  # a curve that several colours have in common
DASHES: list[tuple[float, ...]] = [
    (), (4.5, 1.8), (1.1, 1.5), (6, 1.6, 1.1, 1.6), (9, 2.5), (3, 1.2, 1, 1.2, 1, 1.2), (2.2, 2.2), (8, 1.5, 2.5, 1.5),
]  # fmt: skip
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """One variant of the method: its numbers, and the names by which the legend explains its colour and its line style.

    Usually the colour stands for the schedule and the style for the loss.
    """

    diagnosis: Diagnosis
    colour: str = ""
    style: str = ""


@dataclass(frozen=True)
class Legend:
    """The legend's headings: what colours stand for, and what line styles stand for."""

    colour: str = "schedule"
    style: str = "loss"


def method(variants: Sequence[Variant], title: str, headings: Legend = Legend()) -> Image.Image:
    """Four panels over the timesteps, variants overlaid: noise level, log-SNR, loss weight, relative emphasis.

    Curves that variants have in common are drawn once, in grey where their colours differ.
    """
    figure = Figure(figsize=(13, 7.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    pen = _Pen(variants)
    _noise(axes[0, 0], pen)
    _log_snr(axes[0, 1], pen)
    _weight(axes[1, 0], pen)
    _emphasis(axes[1, 1], pen)
    for axis in axes.flat:
        axis.grid(color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(color="#888888")
    for axis in axes[1]:
        axis.set_xlabel("timestep t  (0: clean; right: noise)")
    pen.legend(figure, headings)
    figure.canvas.draw()
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


class _Pen:
    """Which colour and dashes a variant has, and which variants share a curve."""

    def __init__(self, variants: Sequence[Variant]):
        self.variants = variants
        self.colours = list(dict.fromkeys(variant.colour for variant in variants))
        self.styles = list(dict.fromkeys(variant.style for variant in variants))
        # with a single colour to tell, colours are free to underline the styles
        self.two_marks = len(self.colours) > 1 or len(self.styles) == 1

    def colour(self, variant: Variant) -> str:
        place = self.colours.index(variant.colour) if self.two_marks else self.styles.index(variant.style)
        return COLOURS[place % len(COLOURS)]

    def dashes(self, variant: Variant) -> tuple[float, ...]:
        return DASHES[self.styles.index(variant.style) % len(DASHES)]

    def curves(self, table: Callable[[Diagnosis], Array]) -> list[tuple[Array, list[Variant]]]:
        """Each distinct curve with the variants that have it."""
        found: list[tuple[Array, list[Variant]]] = []
        for variant in self.variants:
            values = table(variant.diagnosis)
            for known, sharing in found:
                if known.shape == values.shape and np.allclose(known, values, rtol=1e-5, atol=1e-8, equal_nan=True):
                    sharing.append(variant)
                    break
            else:
                found.append((values, [variant]))
        return found

    def look(self, sharing: list[Variant], *, noise_only: bool = False) -> dict[str, object]:
        """Line properties of a curve that these variants share; a property on which they differ becomes neutral."""
        colours = list(dict.fromkeys(map(self.colour, sharing)))
        dashes = list(dict.fromkeys(map(self.dashes, sharing)))
        plain = noise_only or len(dashes) > 1
        return {
            "color": colours[0] if len(colours) == 1 else SHARED,
            "dashes": () if plain else dashes[0],
            "linewidth": 1.9,
            "solid_capstyle": "round",
        }

    def legend(self, figure: Figure, headings: Legend) -> None:
        """One column right of the panels: what colour tells, what line style tells, what the other marks mean."""
        entries: list[tuple[Line2D, str]] = []
        blank = Line2D([], [], linestyle="none")
        if len(self.colours) > 1:
            entries.append((blank, headings.colour))
            for place, name in enumerate(self.colours):
                entries.append((Line2D([], [], color=COLOURS[place % len(COLOURS)], lw=3.2), name))
        if len(self.styles) > 1:
            entries += [(blank, "")] * bool(entries) + [(blank, headings.style)]
            for place, name in enumerate(self.styles):
                colour = SHARED if self.two_marks else COLOURS[place % len(COLOURS)]
                entries.append((Line2D([], [], color=colour, lw=1.9, dashes=DASHES[place % len(DASHES)]), name))
        if entries:
            if any(variant.diagnosis.noise[-1].isinf() for variant in self.variants):
                dot = Line2D([], [], color=SHARED, marker="o", linestyle="none")
                entries += [(blank, ""), (dot, "terminal step: pure noise")]
            lines, names = zip(*entries, strict=True)
            made = figure.legend(lines, names, loc="outside right upper", frameon=False, handlelength=3.6)
            for (line, _), text in zip(entries, made.get_texts(), strict=True):
                if line is blank:
                    text.set(fontweight="bold", x=-46)  # a heading stands where the lines begin


def _noise(axis: Axes, pen: _Pen) -> None:
    axis.set_title(r"Noise level  $\sigma / \alpha$", loc="left")
    axis.set_yscale("log")
    curves = pen.curves(lambda d: d.noise.numpy())
    _with_infinite_ends(axis, pen, curves, up=True)


def _log_snr(axis: Axes, pen: _Pen) -> None:
    axis.set_title(r"log-SNR  $\ln(\alpha^2 / \sigma^2)$", loc="left")
    curves = pen.curves(lambda d: d.log_snr.numpy())
    _with_infinite_ends(axis, pen, curves, up=False)


def _with_infinite_ends(axis: Axes, pen: _Pen, curves: list[tuple[Array, list[Variant]]], *, up: bool) -> None:
    """Draw the finite part; an infinite last step is an arrow out of the panel."""
    endless = []
    for values, sharing in curves:
        finite = np.isfinite(values)
        look = pen.look(sharing, noise_only=True)
        (line,) = axis.plot(np.flatnonzero(finite), values[finite], **look)  # type: ignore[arg-type]
        if not finite[-1]:
            endless.append((len(values) - 1, values[finite][-1], line.get_color()))
    low, high = axis.get_ylim()
    for place, (t, last, colour) in enumerate(endless):
        edge = high if up else low
        axis.plot([t, t], [last, edge], color=colour, linewidth=1.9, linestyle=(0, (1, 1.2)), clip_on=False)
        axis.plot([t], [edge], color=colour, marker="^" if up else "v", markersize=9, clip_on=False, zorder=5)
        if place == 0:
            words = r"$\infty$: pure noise" if up else r"$-\infty$: pure noise"
            axis.annotate(
                words, (t, edge), xytext=(-10, -3 if up else 3), textcoords="offset points", ha="right",
                va="top" if up else "bottom", color="#333333",
            )  # fmt: skip
    axis.set_ylim(low, high)


def _weight(axis: Axes, pen: _Pen) -> None:
    axis.set_title("Weight of the squared prediction error", loc="left")
    _weights(axis, pen, pen.curves(lambda d: d.weight.numpy()))
    if len(pen.variants) == 1 and len(axis.lines) > 1:  # without a legend outside, the dot is told here
        axis.legend(axis.lines[1:], ["terminal step: pure noise"], loc="upper right", frameon=False)


def _emphasis(axis: Axes, pen: _Pen) -> None:
    axis.set_title(r"Weight $\times$ density of timesteps, mean 1", loc="left")
    axis.axhline(1, color="#999999", linewidth=1, zorder=1)
    _weights(axis, pen, pen.curves(_relative))
    axis.annotate(
        "even", (1, 1), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points", va="center",
        color="#777777",
    )  # fmt: skip


def _relative(d: Diagnosis) -> Array:
    """[T] the share of each timestep over an even share: of all timesteps, or of the few that are drawn at all."""
    drawn = d.density.numpy() > 0
    even = int(drawn.sum()) if _isolated(drawn) else len(d)
    return d.share.numpy() * even


def _isolated(present: NDArray[np.bool_]) -> bool:
    """Whether most of the timesteps marked in [T] stand alone, as those of a sampler's grid do."""
    alone = present & ~np.append(present[1:], False) & ~np.insert(present[:-1], 0, False)
    return int(alone.sum()) * 2 > int(present.sum())


def _weights(axis: Axes, pen: _Pen, curves: list[tuple[Array, list[Variant]]]) -> None:
    """Lines from zero up; a dot marks the last step's value where the schedule ends in pure noise."""
    top = 0.0
    for values, sharing in curves:
        finite, t = np.isfinite(values), np.arange(len(values))
        look = pen.look(sharing)
        drawn = values[finite]
        top = max(top, float(drawn.max(initial=0)))
        if _isolated(drawn > 0):
            axis.plot(t[finite & (values > 0)], drawn[drawn > 0], ".", color=look["color"], markersize=5)
        else:
            axis.plot(t[finite], drawn, **look)  # type: ignore[arg-type]
        if finite[-1] and any(np.isinf(variant.diagnosis.noise[-1]) for variant in sharing):
            axis.plot(t[-1], values[-1], "o", color=look["color"], markersize=6, clip_on=False, zorder=5)
    if top > 20:
        axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
