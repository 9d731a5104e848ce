"""Metrics over the training: their means, and the paired differences to the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nai_xl.compare.arms import ArmRuns
from nai_xl.compare.comparison import Comparison
from nai_xl.compare.figures.canvas import INK, Drawn, canvas, columns, heading, save
from nai_xl.compare.runs.run import Curve
from nai_xl.compare.statistics.crossed import Array, critical_t
from nai_xl.evals.method_figure import COLOURS, DASHES

Looks = Mapping[str, tuple[str, tuple[float, ...]]]  # label -> colour and dashes


def line_looks(found: Comparison) -> Looks:
    """A colour for each arm, and dashes if there are more arms than colours. The baseline is neutral."""
    looks = {found.arms[0].label: (INK, DASHES[0])}
    for i, arm in enumerate(found.arms[1:]):
        looks[arm.label] = (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)])
    return looks


def curves(found: Comparison) -> Drawn | None:
    """Two panels for each metric that was measured more than once; None if there is no such metric.

    Above is its mean with the range over seeds, below the paired difference to the baseline with its 95 % interval over
    seeds.
    """
    metrics = [metric for metric in found.metrics if _points(found.arms[0], metric) > 1]
    if not metrics:
        return None
    wide = columns(len(metrics))
    deep = -(-len(metrics) // wide)
    names, looks = found.names, line_looks(found)
    seeds = max(len(arm.runs) for arm in found.arms)
    with canvas(8.5 if wide == 1 else 1.2 + 4.9 * wide, 1.1 + 5.4 * deep) as figure:
        axes = figure.subplots(2 * deep, wide, squeeze=False, height_ratios=[3, 2] * deep, sharex=True)
        for place in range(deep * wide):
            above, below = (axes[2 * (place // wide) + half, place % wide] for half in (0, 1))
            if place >= len(metrics):
                above.set_visible(False)
                below.set_visible(False)
                continue
            _curve_panel(above, found, metrics[place], looks)
            _difference_panel(below, found, metrics[place], looks)
            if place % wide == 0:
                above.set_ylabel(f"mean and range\nof {seeds} seeds" if seeds > 1 else "one seed")
                below.set_ylabel("paired difference,\n95 % interval" if seeds > 1 else "paired difference")
        words = [f"{names[found.baseline]} (baseline)", *(names[arm.label] for arm in found.arms[1:])]
        lines = [Line2D([], [], color=colour, dashes=dashes, lw=3) for colour, dashes in looks.values()]
        heading(figure, "Over the training", list(zip(lines, words, strict=True)))
        return save(figure)


def _counted(found: Comparison) -> bool:
    """Whether every arm knows its images per step, so that curves can be drawn over images; else it is over steps."""
    return all(arm.images_per_step is not None for arm in found.arms if arm.runs)


def _scale(found: Comparison, arm: ArmRuns) -> float:
    """By which the arm's steps are drawn."""
    return (arm.images_per_step or 1.0) if _counted(found) else 1.0


def _points(arm: ArmRuns, metric: str) -> int:
    return max((len(run.curves.get(metric, {})) for run in arm.runs.values()), default=0)


def _table(several: Sequence[Curve]) -> tuple[Array, Array]:
    """Steps [N] that all curves share, and their values [S, N]."""
    steps = sorted(set.intersection(*(set(curve) for curve in several)))
    return np.array(steps, dtype=float), np.array([[curve[step] for step in steps] for curve in several])


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
        x, (colour, dashes) = steps * _scale(found, arm), looks[arm.label]
        axis.plot(x, values.mean(0), color=colour, dashes=dashes, lw=2.4)
        faint = min(0.18, 0.7 / len(found.arms))  # many bands over each other must not hide the lines
        axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=faint, lw=0)
        drawn.append(values[np.isfinite(values)])
    every = np.concatenate(drawn) if drawn else np.zeros(0)
    if len(every) and every.min() > 0 and every.max() > 5 * every.min():
        axis.set_yscale("log")
    axis.grid(axis="y")


def _difference_panel(axis: Axes, found: Comparison, metric: str, looks: Looks) -> None:
    axis.axhline(0, color=INK, lw=1.8)
    means = [_difference(axis, arm, found, metric, looks) for arm in found.arms[1:]]
    inner = [mean[np.isfinite(mean)] for mean in means if mean is not None]
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
    axis.set_xlabel("images seen" if _counted(found) else "optimizer steps")


def _difference(axis: Axes, arm: ArmRuns, found: Comparison, metric: str, looks: Looks) -> Array | None:
    """Draw one arm's difference; its mean over seeds, or None if the two have no seed or no step in common."""
    baseline = found.arms[0]
    seeds = [seed for seed in arm.runs if seed in baseline.runs]
    pairs = [(arm.runs[seed], baseline.runs[seed]) for seed in seeds]
    pairs = [pair for pair in pairs if all(metric in run.curves for run in pair)]
    if not pairs:
        return None
    steps, values = _table([run.curves[metric] for pair in pairs for run in pair])
    if not len(steps):
        return None
    difference = values[0::2] - values[1::2]
    mean, (colour, dashes) = difference.mean(0), looks[arm.label]
    x = steps * _scale(found, arm)
    axis.plot(x, mean, color=colour, dashes=dashes, lw=2.2)
    if len(pairs) > 1:
        half = critical_t(len(pairs) - 1) * difference.std(0, ddof=1) / np.sqrt(len(pairs))
        axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.16, lw=0)
    return mean
