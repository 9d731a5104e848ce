"""evals=reconstruction: how well an autoencoder reconstructs pictures that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from nai_xl.data.images import on_canvas, reopen, to_pixels
from nai_xl.data.rows import Item
from nai_xl.evals.contact_sheet import Prompt, contact_sheet
from nai_xl.evals.val_loss import first, item_name
from nai_xl.interfaces import Bucketing, Direction, Ema, Tracker
from nai_xl.record.items import report


@dataclass(kw_only=True)
class AutoencoderStudio:
    """What an evaluator sees of an autoencoder under training. items: pictures to look at."""

    vae: Any
    ema: Ema
    tracker: Tracker
    items: Sequence[Item]
    bucketing: Bucketing
    run_dir: Path


@dataclass(frozen=True)
class Reconstruction:
    """Every `every` steps `count` pictures go through the averaged autoencoder.

    reconstruction/psnr is the mean of 10 log10(255^2 / mean squared difference of the 8-bit pictures) in dB. Each
    picture is shown beside its reconstruction in the figure "reconstructions". Held-out images are taken if there are
    any (data.held_out), and otherwise training images.
    """

    every: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)] = 8
    looks_at: ClassVar[str] = "vae_decoder"
    better: ClassVar[Mapping[str, Direction]] = {"reconstruction/psnr": "higher"}
    equal_within: ClassVar[Mapping[str, str]] = {"reconstruction/psnr": "0.1"}
    incomparable_over: ClassVar[Mapping[str, Sequence[str]]] = {
        "reconstruction/": ("data", "bucketing", "native.resolution")
    }
    changes_weights: ClassVar[bool] = False

    def texts(self, items: Sequence[Item]) -> list[str]:
        return []

    def held_out(self, items: Sequence[Item]) -> list[Item]:
        return first(items, self.count)

    def run(self, step: int, studio: AutoencoderStudio) -> dict[str, float]:
        """Paint, measure, write each picture's value, and return the mean."""
        from nai_xl.model.vae import decode_latents, encode_pixels  # diffusers takes seconds to import; see quality.py

        values: dict[str, float] = {}
        shown, painted = [], []
        with studio.ema.swapped_in():
            for item in self.held_out(studio.items):
                place = studio.bucketing.placements(*item.size)[0]
                picture = on_canvas(reopen(item), place)
                again = decode_latents(studio.vae, encode_pixels(studio.vae, to_pixels(picture)[None]))[0]
                shown.append(Prompt(item.caption, place.bucket, picture))
                painted.append(again)
                values[item_name(item)] = psnr(to_pixels(picture), to_pixels(again))
        studio.tracker.figure("reconstructions", step, contact_sheet(shown, painted))
        return report(studio.run_dir, step, {"reconstruction/psnr": values})


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two pictures [3,H,W] in [-1,1]; infinite for equal ones."""
    error = (one.double() - other.double()).square().mean().item()
    return 10 * math.log10(4 / error) if error else math.inf
