"""Captions: from an image's texts and a sample's random numbers to the text it is trained with.

An image has one caption or several, of which each sample draws one. All draws are functions of (seed, position).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import Field

from nai_xl.errors import UserError
from nai_xl.rng import Draws


class Captions(Protocol):
    """One option of the group `captions`."""

    def whole(self, caption: str) -> str:
        """What is trained on of a caption where nothing is drawn: no part dropped, all in the order written."""
        ...

    def texts(self, captions: Sequence[str]) -> list[str] | None:
        """Every text that `pick` may return of an image with these captions, to be encoded beforehand.

        None, whatever the captions, if they are too many to be listed.
        """
        ...

    def pick(self, captions: Sequence[str], draws: Draws) -> str:
        """The text of one sample of an image with these captions, of which there may be none."""
        ...


@dataclass(frozen=True)
class PlainCaptions:
    """The caption as written, replaced by the empty caption with probability `dropout` (classifier-free guidance,
    Ho and Salimans, 2207.12598).
    """

    dropout: float = 0.1
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        _refuse_no_share(dropout=self.dropout)

    def whole(self, caption: str) -> str:
        return f"{self.prefix}{caption}{self.suffix}"

    def texts(self, captions: Sequence[str]) -> list[str] | None:
        return [*map(self.whole, captions or [""]), ""]

    def pick(self, captions: Sequence[str], draws: Draws) -> str:
        return "" if draws.uniform("caption dropout") < self.dropout else self.whole(one_of(captions, draws))


@dataclass(frozen=True)
class TagCaptions:
    """A caption is a list of tags. The first `keep` stay where they are. Of the others each is dropped with probability
    `tag_dropout`, and what is left is shuffled.

    Where a caption contains `keep_until`, the tags before that mark are kept instead, and the mark is taken out. Tags
    are joined by the separator and a blank; empty ones are left out. The caption as a whole is replaced by the empty
    one with probability `dropout`, as by captions=plain.
    """

    dropout: float = 0.1
    shuffle: bool = True
    keep: Annotated[int, Field(ge=0)] = 0
    keep_until: str = ""
    tag_dropout: float = 0.0
    separator: str = ","
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        _refuse_no_share(dropout=self.dropout, tag_dropout=self.tag_dropout)
        if not self.separator.strip():
            raise UserError(f"captions.separator={self.separator!r}: must be a visible character, such as ','")

    def whole(self, caption: str) -> str:
        kept, loose = self._tags(caption)
        return self._joined([*kept, *loose])

    def texts(self, captions: Sequence[str]) -> list[str] | None:
        return None if self.shuffle or self.tag_dropout else [*map(self.whole, captions or [""]), ""]

    def pick(self, captions: Sequence[str], draws: Draws) -> str:
        if draws.uniform("caption dropout") < self.dropout:
            return ""
        kept, loose = self._tags(one_of(captions, draws))
        # by the tag and not by its place: a tag that is added to a caption changes nothing of the others
        if self.tag_dropout:
            loose = [tag for tag in loose if draws.uniform(f"tag dropout {tag}") >= self.tag_dropout]
        if self.shuffle:
            loose = sorted(loose, key=lambda tag: draws.uniform(f"tag order {tag}"))
        return self._joined([*kept, *loose])

    def _tags(self, caption: str) -> tuple[list[str], list[str]]:
        """Those that are kept, and the others."""
        if self.keep_until and self.keep_until in caption:
            before, _, after = caption.partition(self.keep_until)
            return [*self._split(before)], [*self._split(after)]
        tags = [*self._split(caption)]
        return tags[: self.keep], tags[self.keep :]

    def _split(self, text: str) -> Iterator[str]:
        return (tag for part in text.split(self.separator.strip()) if (tag := part.strip()))

    def _joined(self, tags: Sequence[str]) -> str:
        return f"{self.prefix}{f'{self.separator.strip()} '.join(tags)}{self.suffix}"


def one_of(captions: Sequence[str], draws: Draws) -> str:
    """The caption of a sample: with one there is nothing to draw, and without any it is empty."""
    if len(captions) < 2:
        return captions[0] if captions else ""
    return captions[draws.choice("caption variant", len(captions))]


def _refuse_no_share(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"captions.{name}={share}: must lie in [0, 1]")
