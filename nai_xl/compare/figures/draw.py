"""Every figure of a report that there is something to draw for."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import DictConfig

from nai_xl.compare.comparison import Comparison
from nai_xl.compare.figures.canvas import Drawn
from nai_xl.compare.figures.curves import curves
from nai_xl.compare.figures.forest import forest
from nai_xl.compare.figures.method import method
from nai_xl.compare.figures.samples import samples

Figures = Mapping[str, tuple[Drawn, str]]  # name -> the figure, and the sentence below it


def draw(found: Comparison, configs: Mapping[str, DictConfig]) -> Figures:
    """The figures in the order of the report. `configs`: run name -> its config, as far as they are here."""
    made = {
        "differences": (
            forest(found),
            "Difference to the baseline at the end: thick, the paired 95 % interval; thin, what the same runs would "
            "have shown unpaired (an arrow: it goes on); shaded, the margin of equality. Colour and mark tell the "
            "verdict.",
        ),
        "curves": (
            curves(found),
            "Over the training: the mean of the seeds with their range, and below it the paired difference to the "
            "baseline with its 95 % interval over seeds.",
        ),
    }
    for seed in sorted({seed for arm in found.arms for seed in arm.runs}):
        words = f"The same prompts and the same noise in every arm, after training with seed {seed}."
        made[f"samples_seed_{seed}"] = (samples(found, seed), words)
    made["method"] = (method(found, configs), "What the arms do: noise levels and how much each timestep counts.")
    return {name: (drawn, words) for name, (drawn, words) in made.items() if drawn is not None}
