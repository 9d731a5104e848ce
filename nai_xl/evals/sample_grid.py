"""evals=sample_grid: a grid of fixed prompts and fixed noise, to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from PIL import Image
from pydantic import Field

from nai_xl.data.images import UNREADABLE, on_canvas, picture
from nai_xl.data.rows import Item
from nai_xl.evals.contact_sheet import Prompt, contact_sheet, unavailable
from nai_xl.evals.painter import Studio
from nai_xl.interfaces import Direction, Placement


@dataclass
class SampleGrid:
    """Every `every` steps a grid of fixed prompts and fixed noise, painted with the averaged weights.

    Without `prompts`, `count` training captions spread over the data are taken, and the training image stands beside
    each sample if it is a picture.
    """

    better: ClassVar[Mapping[str, Direction]] = {}
    equal_within: ClassVar[Mapping[str, str]] = {}
    incomparable_over: ClassVar[Mapping[str, Sequence[str]]] = {}
    changes_weights: ClassVar[bool] = False
    looks_at: ClassVar[str] = "text_to_image"

    every: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)] = 12
    seed: int = 0
    prompts: Sequence[str] | None = None
    _prompts: list[Prompt] = field(default_factory=list, init=False, repr=False)

    def texts(self, items: Sequence[Item]) -> list[str]:
        """The prompts, known before training so that their text conditions can be cached."""
        return list(self.prompts) if self.prompts else [item.caption for item in self.picked(items)]

    def held_out(self, items: Sequence[Item]) -> list[Item]:
        """None: the grid shows training images."""
        return []

    def picked(self, items: Sequence[Item]) -> list[Item]:
        """`count` items evenly spread over the index."""
        count = min(self.count, len(items))
        return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]

    def run(self, step: int, studio: Studio) -> dict[str, float]:
        """Paint the grid and hand it to the tracker as the figure "samples"."""
        if not self._prompts:
            self._prompts = self._from_texts(studio) if self.prompts else self._from_images(studio)
        with studio.ema.swapped_in():
            samples = studio.paint(self._prompts, self.seed)
        studio.tracker.figure("samples", step, contact_sheet(self._prompts, samples))
        return {}

    def _from_texts(self, studio: Studio) -> list[Prompt]:
        return [Prompt(text, studio.square) for text in self.prompts or ()]

    def _from_images(self, studio: Studio) -> list[Prompt]:
        encoded = studio.encoded
        chosen = [(item, encoded.latents.of(item)[0].placement) for item in self.picked(encoded.index.items)]
        return [Prompt(item.caption, p.bucket, _picture(item, p)) for item, p in chosen]


def _picture(item: Item, placement: Placement) -> Image.Image | None:
    """The training image on its canvas, or a grey cell where its file has gone since the run began."""
    if item.drawn is not None:
        return None
    try:
        return on_canvas(picture(item), placement)
    except UNREADABLE:
        return unavailable(placement.bucket, f"{item.path.name} can no longer be read")
