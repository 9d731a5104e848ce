"""Main effects and interactions against values that are built in."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from nai_xl.compare.comparison import Comparison, compare
from nai_xl.compare.question import Question
from nai_xl.compare.report.results import as_json
from nai_xl.compare.runs.run import Run
from tests.compare.losses import Command
from tests.synthetic import write_run

LOSS, SCHEDULE = {"uniform": 0, "minsnr": 1}, {"linear": 0, "ztsnr": 1}


def grid(metric: str, *, loss: float, schedule: float, both: float, log: bool = True, seeds: int = 5) -> Comparison:
    """Log errors, or values, that are a sum of these effects, a seed's noise and a little of the arm's own."""
    runs = []
    for (a, x), (b, y) in itertools.product(LOSS.items(), SCHEDULE.items()):
        for seed in range(seeds):
            shared = np.random.default_rng(seed).normal()
            own = np.random.default_rng([seed, x, y]).normal() / 1000
            value = loss * x + schedule * y + both * x * y + shared + own
            curves = {metric: {100: float(np.exp(value) if log else value)}}
            runs.append(Run(f"{a}-{b}-{seed}", {"loss": a, "schedule": b}, seed, curves=curves))
    return compare(runs, Question("x", baseline="loss=uniform,schedule=linear"))


def test_effects_of_ratios_multiply() -> None:
    found = grid("color/error", loss=-0.2, schedule=0.0, both=0.1)
    loss, schedule, both = found.contrasts
    assert [one.name for one in found.contrasts] == [
        "loss=minsnr", "schedule=ztsnr", "loss=minsnr x schedule=ztsnr",
    ]  # fmt: skip
    assert loss.effect.estimate == pytest.approx(-0.15, abs=0.002)  # the mean of -0.2 and -0.1
    assert schedule.effect.estimate == pytest.approx(0.05, abs=0.002)
    assert both.effect.estimate == pytest.approx(0.1, abs=0.003)
    assert loss.percent is not None and loss.percent[0] == pytest.approx(100 * np.expm1(-0.15), abs=0.2)
    assert both.percent is not None and both.percent[1] < 100 * np.expm1(0.1) < both.percent[2]
    assert [one.verdict for one in found.contrasts] == ["better", "worse", "shown"]
    assert [row["name"] for row in as_json(found)["contrasts"]] == [one.name for one in found.contrasts]


def test_effects_of_other_metrics_add_up() -> None:
    found = grid("coherence/right", loss=0.3, schedule=0.1, both=0.0, log=False)
    loss, schedule, both = found.contrasts
    assert loss.percent is None and loss.effect.difference == pytest.approx(0.3, abs=0.002)
    assert schedule.effect.difference == pytest.approx(0.1, abs=0.002) and both.verdict == "undecided"
    assert both.effect.low is not None and both.effect.high is not None and both.effect.low < 0 < both.effect.high
    p = [one.effect.p or 0 for one in found.contrasts]
    assert min(one.p_holm or 0 for one in found.contrasts) == pytest.approx(3 * min(p))  # among themselves
    few = grid("coherence/right", loss=0.3, schedule=0.1, both=0.0, log=False, seeds=2)
    assert {one.verdict for one in few.contrasts} == {"too few seeds"}


def test_what_is_no_whole_grid_has_no_main_effects() -> None:
    whole = grid("color/error", loss=-0.2, schedule=0.0, both=0.1)
    runs = [run for arm in whole.arms for run in arm.runs.values()]
    asked = whole.asked
    assert compare([run for run in runs if run.arm != {"loss": "minsnr", "schedule": "ztsnr"}], asked).contrasts == []
    assert compare([run for run in runs if run.arm["loss"] == "uniform"], Question("x")).contrasts == []
    assert compare([run for run in runs if run.name != "minsnr-ztsnr-3"], asked).contrasts == []


def test_the_report_has_a_table_of_them(told: Command, tmp_path: Path) -> None:
    for a, b in itertools.product(LOSS, SCHEDULE):
        for seed in range(3):
            effect = {"color/error": 0.02 * (a == "minsnr")}
            write_run(tmp_path, {"loss": a, "schedule": b}, seed, effect=effect, sweep="grid")
    out = told("sweep=grid", f"output_dir={tmp_path}", "baseline=loss=uniform,schedule=linear")
    assert "main effects and interactions" in out and "loss=minsnr x schedule=ztsnr" in out
    (folder,) = tmp_path.glob("compare-grid-*")
    assert "Main effects and interactions" in (folder / "report.html").read_text()
    assert "| color/error | loss=minsnr |" in (folder / "report.md").read_text()
    items = {row["effect"]["items"] for row in json.loads((folder / "results.json").read_text())["contrasts"]}
    assert items == {24}
