"""Where images come from. A source is anything with `scan() -> Index`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from nai_xl.data.index import Index, scan
from nai_xl.data.source.drawing import EVERYTHING, Colors, Kind, Numbers, Shapes, Vocabulary, write_shapes
from nai_xl.files import user_cache

Share = Annotated[float, Field(ge=0, lt=1)]


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError("no such folder; give a folder of images, each with a caption in a .txt file of the same name")
    return path


@dataclass(frozen=True)
class FolderSource:
    """A folder, searched recursively, of jpg, png and webp images with same-name .txt captions.

    `held_out` is the share of them that is never trained on, for evaluators.
    """

    dir: Annotated[Path, AfterValidator(_existing)]
    min_side: int = 16
    held_out: Share = 0.0

    def scan(self) -> Index:
        return scan(self.dir, min_side=self.min_side).hold_out(self.held_out)


@dataclass(frozen=True)
class SampleSource:
    """Photographs and colour cards with captions, written once into `cache` (default: the user's cache directory)."""

    without_effect: ClassVar[tuple[str, ...]] = ("cache",)

    cache: Path | None = None
    held_out: Share = 0.0

    def scan(self) -> Index:
        from nai_xl.data.source.photographs import write_sample  # needs the extra "demo", which data=folder does not

        return FolderSource(write_sample((self.cache or user_cache()) / "sample"), held_out=self.held_out).scan()


@dataclass(frozen=True)
class ShapesSource:
    """`count` drawn pictures for a model of native edge `resolution`: bodies to be counted, and single colours.

    `bodies`, `colors`, `shapes` and `backgrounds` are what they show: fewer of them are learned sooner.
    """

    without_effect: ClassVar[tuple[str, ...]] = ("cache",)

    resolution: Annotated[int, Field(ge=64, multiple_of=16)]
    count: Annotated[int, Field(ge=1)] = 1000
    seed: int = 0
    include: Annotated[Sequence[Kind], Field(min_length=1)] = ("shapes", "colors")
    bodies: Numbers = EVERYTHING.bodies
    colors: Colors = EVERYTHING.colors
    shapes: Shapes = EVERYTHING.shapes
    backgrounds: Colors = EVERYTHING.backgrounds
    held_out: Share = 0.1
    cache: Path | None = None

    def scan(self) -> Index:
        words = Vocabulary(self.bodies, self.colors, self.shapes, self.backgrounds)
        cache = self.cache or user_cache()
        folder = write_shapes(cache, self.count, self.seed, self.include, self.resolution, words)
        return FolderSource(folder, held_out=self.held_out).scan()
