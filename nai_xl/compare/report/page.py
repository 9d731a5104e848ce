"""The report as one page that needs nothing else: no script and no network, on light and dark, on screen and paper."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nai_xl.compare.comparison import Comparison
from nai_xl.compare.costs import Cost, Target
from nai_xl.compare.figures.canvas import Drawn
from nai_xl.compare.figures.draw import Figures
from nai_xl.compare.judging.rows import Row
from nai_xl.compare.power import SEEDS, Power, needed, power
from nai_xl.compare.runs.naming import word
from nai_xl.compare.wording import (
    CONTRAST_COLUMNS,
    DASH,
    about,
    answer,
    change,
    contrast_cells,
    interval,
    narrower,
    number,
    p_value,
    percent,
    remarks,
    said,
)

RESULT_COLUMNS = (
    "arm", "verdict", "mean", "difference", "", "95 % interval", "p (Holm)", "narrower by pairing", "seeds x items",
)  # fmt: skip
TARGET_COLUMNS = (
    "arm",
    "images, mean",
    "baseline",
    "seeds that reached it",
    "share of the baseline's",
    "95 % interval",
)
POWER_COLUMNS = ("metric", "arm", "seeds here", *(f"{n} seeds" for n in SEEDS))
COST_COLUMNS = ("arm", "runs", "minutes a run", "images a run", "images/s", "peak memory, GiB")


def page(found: Comparison, figures: Figures) -> str:
    """The whole document. Of the figures whose name begins with "samples", all but the first are folded away."""
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=here, autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("page.html.j2").render(
        title=found.asked.question or f"{found.asked.name}: which arm is better?",
        about=about(found),
        answers=[_answer(found, metric) for metric in found.metrics],
        arms=[found.names[arm.label] for arm in found.arms],
        baseline=found.names[found.baseline],
        result_columns=RESULT_COLUMNS,
        results=[_results(found, metric) for metric in found.metrics],
        notes=[*found.notes, *remarks(found)],
        figures=_pictures(figures),
        contrast_columns=CONTRAST_COLUMNS,
        contrasts=[contrast_cells(one) for one in found.contrasts],
        target_columns=TARGET_COLUMNS,
        target_metric=found.targets[0].metric if found.targets else "",
        targets=[_target(target, found.names[target.arm]) for target in found.targets],
        power_columns=POWER_COLUMNS,
        powers=[_power(one, found.names[one.arm]) for one in power(found)],
        needed=needed(found),
        cost_columns=COST_COLUMNS,
        costs=[_cost(cost, found.names[cost.arm]) for cost in found.costs],
        differences=[(key, [_shown(value) for value in values]) for key, values in found.differences.items()],
    )


def _answer(found: Comparison, metric: str) -> dict[str, Any]:
    """The sentence in parts, so that verdicts have their colours; `side` colours the whole if all verdicts agree."""
    verdicts = {row.verdict for row in found.of(metric)} & {"better", "worse"}
    side = verdicts.pop() if len(verdicts) == 1 else ""
    return {"metric": metric, "side": side, "parts": re.split(r"\b(better|worse)\b", answer(found, metric))}


def _results(found: Comparison, metric: str) -> dict[str, Any]:
    """The rows of one metric: (arm, verdict, the verdict in words, further cells)."""
    rows = found.of(metric)
    return {
        "metric": metric,
        "baseline_mean": number(found.baseline_mean(metric)),
        "rows": [(found.names[row.arm], row.verdict, said(row), _cells(row)) for row in rows],
    }


def _cells(row: Row) -> list[str]:
    e = row.effect
    return [
        number(row.mean),
        change(e.difference) if e else DASH,
        percent(row),
        interval(row),
        p_value(row.p_holm),
        narrower(row).replace(" x", "\N{NO-BREAK SPACE}x").replace("seeds ", "seeds\N{NO-BREAK SPACE}"),
        f"{e.seeds} x {e.items}" if e and e.items > 1 else str(e.seeds) if e else DASH,
    ]


def _target(target: Target, name: str) -> list[str]:
    reached = [images for images in target.images.values() if images is not None]
    mean = sum(target.baseline_images.values()) / len(target.baseline_images)
    times = target.ratio
    return [
        name,
        f"{sum(reached) / len(reached):,.0f}" if reached else "not reached",
        f"{mean:,.0f}",
        f"{len(reached)} of {len(target.images)}",
        number(times[0]) if times else DASH,
        f"{number(times[1])} to {number(times[2])}" if times and times[1] is not None else DASH,
    ]


def _power(one: Power, name: str) -> list[str]:
    return [one.metric, name, f"{one.seeds}: {one.size(one.seeds)}", *(one.size(n) for n in SEEDS)]


def _cost(cost: Cost, name: str) -> list[str]:
    return [
        name,
        str(cost.runs),
        number(None if cost.seconds is None else round(cost.seconds / 60, 2)),
        DASH if cost.images is None else f"{cost.images:,.0f}",
        number(cost.images_per_second),
        number(cost.peak_memory_gib),
    ]


def _shown(value: object) -> str:
    return DASH if value is None else word(value)


@dataclass(frozen=True)
class Picture:
    """A figure of the page: its SVG, or its PNG as a data URI, and the figures that are folded away below it."""

    svg: Markup
    png: str
    caption: str
    folded: tuple[Picture, ...] = ()


def _pictures(figures: Figures) -> list[Picture]:
    samples = [name for name in figures if name.startswith("samples")]
    folded = tuple(_picture(*figures[name]) for name in samples[1:])
    shown = [name for name in figures if name not in samples[1:]]
    return [_picture(*figures[name], folded=folded if name in samples else ()) for name in shown]


def _picture(drawn: Drawn, caption: str, folded: tuple[Picture, ...] = ()) -> Picture:
    # the SVG is our own, so it is not escaped
    return Picture(Markup(drawn.svg), "" if drawn.svg else data_uri(drawn.png), caption, folded)


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
