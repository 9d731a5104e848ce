"""evals=color: does the model paint an image of a single colour when asked for one?

This tests the claim behind zero terminal SNR. If the noisiest input of the training still shows the image's mean
brightness, a model learns to take the brightness from its input. Sampling begins with pure noise, of medium brightness,
so black and white come out grey (Lin et al. 2305.08891, figure 1; NovelAI V3, 2409.15997, section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from nai_xl.data.source.drawing import PALETTE, Scene
from nai_xl.evals.prompted import PromptedEvaluator, Values, suffix
from nai_xl.interfaces import Direction
from nai_xl.record.items import mean

LUMA = np.array([0.2126, 0.7152, 0.0722])  # of R, G, B by ITU-R BT.709, applied to sRGB values without linearising


def _known(colours: Sequence[str]) -> Sequence[str]:
    if unknown := [colour for colour in colours if colour not in PALETTE]:
        raise ValueError(f"no colour {unknown[0]}; there is {', '.join(PALETTE)}")
    return colours


@dataclass(frozen=True)
class Color(PromptedEvaluator):
    """Asks for "a completely black image" and so on, and compares each sample's mean colour with the prompted one.

    `wording` is the prompt, with {} for the colour: change it for models that were trained on other captions than those
    of data=shapes and data=sample. A sample's error is the root of the mean squared difference of R, G and B in [0,1].
    color/error is its mean over all samples, color/error_<colour> its mean over those of one colour. Luminance is in
    [0,1]; color/luminance is its mean over samples. Averaged over seeds, color/luminance_min is the darkest prompt's,
    color/luminance_max the brightest prompt's, and color/luminance_range their difference.
    """

    better: ClassVar[Mapping[str, Direction]] = {
        "color/error": "lower",
        "color/luminance_min": "lower",
        "color/luminance_max": "higher",
        "color/luminance_range": "higher",
    }
    equal_within: ClassVar[Mapping[str, str]] = {"color/": "5%", "color/luminance": "0.02"}
    incomparable_over: ClassVar[Mapping[str, Sequence[str]]] = {
        "color/": ("sampling.guidance", "sampling.rescale")  # both move colours by themselves
    }

    colors: Annotated[Sequence[str], AfterValidator(_known)] = tuple(PALETTE)
    wording: str = Scene("{}").caption

    def prompts(self) -> Mapping[str, str]:
        return {color: self.wording.replace("{}", color) for color in self.colors}

    def measure(self, name: str, pixels: NDArray[np.uint8]) -> Mapping[str, float]:
        return {
            "color/error": color_error(pixels, PALETTE[name]),
            "color/luminance": float(mean_color(pixels) @ LUMA),
        }

    def summary(self, table: Values) -> dict[str, float]:
        values: dict[str, float] = {}
        for size in map(suffix, self.sizes):
            errors, luminances = (self._by_color(table[f"color/{what}{size}"]) for what in ("error", "luminance"))
            values |= {f"color/error_{color}{size}": error for color, error in errors.items()}
            darkest, brightest = min(luminances.values()), max(luminances.values())
            values[f"color/luminance_min{size}"], values[f"color/luminance_max{size}"] = darkest, brightest
            values[f"color/luminance_range{size}"] = brightest - darkest
        return values

    def _by_color(self, items: Mapping[str, float]) -> dict[str, float]:
        """Each prompt's mean over its seeds."""
        return {color: mean(v for item, v in items.items() if item.split("/")[0] == color) for color in self.colors}


def mean_color(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[H, W, 3] -> [3] in [0,1]."""
    return pixels.mean(axis=(0, 1), dtype=np.float64) / 255


def color_error(pixels: NDArray[np.uint8], wanted: tuple[int, int, int]) -> float:
    """sqrt of the mean over R, G, B of (mean of [H, W, 3] - wanted)^2, in [0,1]."""
    return float(np.sqrt(np.square(mean_color(pixels) - np.array(wanted) / 255).mean()))
