"""data=shapes: pictures drawn by nai_xl.data.source.drawing, written once as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from nai_xl.data.cache import content_key
from nai_xl.data.index import Index
from nai_xl.data.source import Share
from nai_xl.data.source.drawing import (
    EVERYTHING,
    VERSION,
    Colors,
    Kind,
    Numbers,
    Picture,
    Shapes,
    Vocabulary,
    picture,
)
from nai_xl.data.source.folder import FolderSource
from nai_xl.data.source.stored_png import stored_png
from nai_xl.errors import UserError
from nai_xl.files import user_cache, write_atomically


@dataclass(frozen=True)
class ShapesSource:
    """`count` drawn pictures for a model of native edge `resolution`: bodies to be counted, and single colours.

    `bodies`, `colors`, `shapes` and `backgrounds` are what they show: fewer of them are learned sooner.
    """

    without_effect: ClassVar[tuple[str, ...]] = ("cache",)  # on the trained weights

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


def write_shapes(
    cache: Path, number: int, seed: int, include: Sequence[Kind], resolution: int, words: Vocabulary = EVERYTHING
) -> Path:
    """The folder in `cache` of these pictures as .png with .txt captions; files that are missing are written.

    Raises UserError when it cannot be written.
    """
    folder = cache / f"shapes-{content_key(VERSION, number, seed, sorted(include), resolution, *map(list, words))[:12]}"
    try:
        for place in range(number):
            image = folder / f"{place:06d}.png"
            if not (image.exists() and image.with_suffix(".txt").exists()):
                _write(picture(seed, place, include=include, resolution=resolution, words=words), image)
    except OSError as error:
        raise UserError(
            f"Cannot write data=shapes into {folder} ({error.strerror or error}). Choose another place with "
            "data.cache=DIR or the environment variable NAI_XL_CACHE."
        ) from error
    return folder


def _write(drawn: Picture, image: Path) -> None:
    content, caption = stored_png(drawn.places(), drawn.palette()), drawn.scene.caption + "\n"
    write_atomically(image.with_suffix(".txt"), lambda path: path.write_text(caption, encoding="utf-8"))
    write_atomically(image, lambda path: path.write_bytes(content))
