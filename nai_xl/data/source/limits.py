"""What every source leaves out of the images that it can read, and what it has to say of the rest."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from nai_xl.data.colour import Profile
from nai_xl.data.index import Index, OnChange
from nai_xl.data.rows import Rows
from nai_xl.data.skipped import SCHEMA
from nai_xl.data.source import Share


def _encoding(name: str) -> str:
    try:
        return codecs.lookup(name).name
    except LookupError as error:
        raise ValueError(f"no encoding has the name {name!r}; give one such as utf-8, cp1252 or shift_jis") from error


Encoding = Annotated[str, AfterValidator(_encoding)]


@dataclass(frozen=True, kw_only=True)
class Limited:
    """The settings that sources of images share.

    `held_out` is the share of the images that is never trained on, for evaluators. Images of more than
    `max_megapixels` million pixels, which take 8 MB of memory for each million while they are read, and those with a
    caption of more than `max_caption` bytes are skipped, and listed with the rest.
    """

    without_effect: ClassVar[tuple[str, ...]] = ("on_change",)  # on which run it is

    min_side: int = 16
    max_megapixels: Annotated[float, Field(gt=0)] = 100.0
    max_caption: Annotated[int, Field(ge=1)] = 65536
    blank_captions: Literal["keep", "skip"] = "keep"
    held_out: Share = 0.0
    on_change: OnChange = "refuse"

    def settled(self, index: Index) -> Index:
        """The index as the run gets it."""
        index.on_change = self.on_change
        return index.hold_out(self.held_out)


@dataclass
class Choice:
    """Which rows of a table of usable images are within the limits, and the skipped ones with their reasons.

    The table has columns width, height, path, and of a source's notes _longest and _profile.
    """

    table: pa.Table
    limits: Limited
    kept: NDArray[np.bool_] = field(init=False)
    skipped: list[pa.Table] = field(default_factory=list)  # of skipped.SCHEMA

    def __post_init__(self) -> None:
        limits, table = self.limits, self.table
        self.kept = np.ones(len(table), np.bool_)
        width, height = (table[name].to_numpy().astype(np.int64) for name in ("width", "height"))
        size = _joined(table["width"], "x", table["height"], " pixels")
        self._skip(
            np.minimum(width, height) < limits.min_side, "too small", size, f"data.min_side is {limits.min_side}"
        )
        largest = f"data.max_megapixels is {limits.max_megapixels:g}"
        self._skip(width * height > limits.max_megapixels * 1e6, "too large", size, largest)
        longest = table["_longest"].to_numpy()
        caption = _joined("caption of ", table["_longest"], " bytes")
        allowed = f"data.max_caption is {limits.max_caption}"
        self._skip(longest > limits.max_caption, "caption too long", caption, allowed)
        if limits.blank_captions == "skip":
            blank = pa.chunked_array([pa.array(["blank caption"] * len(table), pa.string())])
            self._skip(longest == 0, "blank caption", blank, "data.blank_captions is skip")

    def _skip(self, where: NDArray[np.bool_], kind: str, words: pa.ChunkedArray, reason: str) -> None:
        """words: the beginning of the reason for each row of the table."""
        where = where & self.kept
        if where.any():
            mask = pa.array(where)
            reasons = pc.binary_join_element_wise(words.filter(mask), reason, "; ")
            columns = [self.table["path"].filter(mask), pa.array([kind] * len(reasons), pa.string()), reasons]
            self.skipped.append(pa.table(columns, schema=SCHEMA))
            self.kept &= ~where

    def of(self, rows: Rows) -> Rows:
        """Those of the table's rows that are kept."""
        return rows if self.kept.all() else rows.take(np.flatnonzero(self.kept))

    def remarks(self) -> Iterable[str]:
        """What is not as one may expect of the kept ones, each once with its count."""
        if blank := int(((self.table["_longest"].to_numpy() == 0) & self.kept).sum()):
            mend = "data.blank_captions=skip leaves them out"
            yield f"{blank} images have a blank caption and are trained with it; {mend}"
        profiles = np.bincount(self.table["_profile"].to_numpy()[self.kept], minlength=len(Profile))
        if count := int(profiles[Profile.CONVERTED]):
            yield f"{count} images have a colour profile of their own and are converted to sRGB"
        if count := int(profiles[Profile.DAMAGED]):
            yield f"{count} images have a damaged colour profile, which is ignored"


def faults(table: pa.Table) -> pa.Table:
    """What an index file's notes say of images that cannot be used, as skipped.SCHEMA has it."""
    return table.select(["path", "_kind", "_fault"]).rename_columns(SCHEMA.names).replace_schema_metadata(None)


def in_order(skipped: Sequence[pa.Table]) -> pa.Table:
    whole = pa.concat_tables(skipped)
    return whole.take(pc.sort_indices(whole["path"]))


def _joined(*parts: pa.ChunkedArray | str) -> pa.ChunkedArray:
    words = [part if isinstance(part, str) else part.cast(pa.string()) for part in parts]
    return pc.binary_join_element_wise(*words, "")
