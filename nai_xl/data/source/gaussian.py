"""data=gaussian: random fields whose distribution is known, so that the best possible model is, too.

They are latents and have no pictures: an item draws them for the canvas that it is placed on, and no autoencoder is
asked. "a red field" has the mean of red and waves of all lengths around it; nai_xl.diffusion.ideal has the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from nai_xl.data.cache import content_key
from nai_xl.data.index import Index
from nai_xl.data.rows import Item
from nai_xl.data.source import Share
from nai_xl.diffusion.ideal import Law, power_spectrum
from nai_xl.interfaces import Bucket
from nai_xl.rng import draws

VERSION = 1  # raise it whenever other fields come out of the same settings
# the signs of the four channels' means: the rows of a Hadamard matrix and their negatives, so that over all captions
# the channels have mean 0 and are uncorrelated
MEANS = {
    "white": (1, 1, 1, 1),
    "black": (-1, -1, -1, -1),
    "red": (1, 1, -1, -1),
    "green": (-1, -1, 1, 1),
    "blue": (1, -1, 1, -1),
    "yellow": (-1, 1, -1, 1),
    "purple": (1, -1, -1, 1),
    "orange": (-1, 1, 1, -1),
}


class GaussianField(NamedTuple):
    """One field: latents [4,h,w] of variance 1 around the mean of its colour, `mean` or -`mean` in each channel."""

    colour: str
    power: float
    mean: float
    seed: int
    number: int

    def law(self, bucket: Bucket) -> Law:
        """The distribution that the field is drawn from, all that its caption tells."""
        signs = torch.tensor(MEANS[self.colour], dtype=torch.float64)
        spectrum = power_spectrum(bucket.height // 8, bucket.width // 8, self.power)
        return Law(self.mean * signs[:, None, None], spectrum.expand(len(signs), -1, -1))

    def latents(self, bucket: Bucket) -> Tensor:
        law = self.law(bucket)
        return law.draw(draws(self.seed, self.number).noise(law.spectrum.shape, "gaussian field")).float()


@dataclass(frozen=True)
class GaussianSource:
    """`count` fields whose power falls as |k|^-`power`, k cycles per canvas, for a model of native edge `resolution`.

    `power`: 0 is white noise, 2 about what photographs have, 3 and more mostly the longest waves. `mean`: how far a
    caption's mean lies from 0 in each channel, in deviations of the field.
    """

    resolution: Annotated[int, Field(ge=8, multiple_of=8)]
    count: Annotated[int, Field(ge=1)] = 4000
    seed: int = 0
    power: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    mean: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    held_out: Share = 0.1

    def scan(self) -> Index:
        items = [self._item(number) for number in range(self.count)]
        return Index(sorted(items, key=lambda item: (item.content, item.caption))).hold_out(self.held_out)

    def _item(self, number: int) -> Item:
        colour = list(MEANS)[draws(self.seed, number).choice("gaussian colour", len(MEANS))]
        field = GaussianField(colour, self.power, self.mean, self.seed, number)
        size = self.resolution, self.resolution
        content = content_key("gaussian", VERSION, *field)
        return Item(Path(f"gaussian/{number:06d}"), f"a {colour} field", size, content, drawn=field)
