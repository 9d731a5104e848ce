"""evals=color: does a prompted single colour come out? The claim behind zero terminal SNR.

A model whose schedule ends with some signal left learns that the mean brightness is always in the noise already, and
paints black and white as grey. Lin et al. 2305.08891, figure 1; NovelAI V3, 2409.15997, section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from nai_xl.data.source.drawing import PALETTE, Scene
from nai_xl.evals.painting import PaintedPrompts, Values, suffix
from nai_xl.record.items import mean

LUMA = np.array([0.2126, 0.7152, 0.0722])  # ITU-R BT.709, of the sRGB values as they are stored


def _known(colours: Sequence[str]) -> Sequence[str]:
    if unknown := [colour for colour in colours if colour not in PALETTE]:
        raise ValueError(f"no colour {unknown[0]}; there is {', '.join(PALETTE)}")
    return colours


@dataclass(frozen=True)
class Color(PaintedPrompts):
    """Prompts "a completely black image" and so on, and compares each sample's mean colour with the prompted one.

    `wording` has {} where the colour stands, for models that were trained on other captions than data=shapes' and
    data=sample's. color/error is the root of the mean squared difference of R, G and B in [0,1], over all prompts, and
    color/error_<colour> of one. Luminance is in [0,1]; color/luminance_min and _max are the darkest and brightest
    prompts' means over seeds, and color/luminance_range is their difference.
    """

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
