"""Where images come from: one module for each option of the config group `data`."""

from __future__ import annotations

from typing import Annotated, Protocol

from pydantic import Field

from nai_xl.data.index import Index

Share = Annotated[float, Field(ge=0, lt=1)]
"""The part of the images that is never trained on, for evaluators (Index.hold_out)."""


class Source(Protocol):
    """What an option of `data` is. Its parameters are the keys below `data`."""

    def scan(self) -> Index:
        """Every usable image with its caption, and what was skipped.

        Raises UserError when nothing usable is there. Pillow opens what Item.open gives: the file Item.path, or what
        Item.store reads. An item may also draw its latents itself (Item.drawn). Items must come in an order that
        depends on the images alone, for instance sorted by (content, caption): a run's random numbers belong to places
        in that order. Index takes a list of Items, or Rows, which cost no memory for each image.
        """
        ...
