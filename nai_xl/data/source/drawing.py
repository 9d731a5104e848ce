"""The pictures of data=shapes, whose captions tell everything that is in them.

"two red circles on a white background", "one blue square on the left of a grey background", "a completely black
image". A caption is read back by `read`, so whatever a model paints for it can be measured against the truth. Pictures
are a function of (seed, number): hashed draws, whole numbers and uncompressed files make them the same bytes on every
machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice, product
from typing import Annotated, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nai_xl.data.source.stored_png import COLOURS
from nai_xl.errors import UserError
from nai_xl.rng import Draws, draws

VERSION = 1  # raise it whenever other pictures come out of the same settings
Kind = Literal["shapes", "colors"]
Shape = Literal["circle", "square", "triangle"]
Color = Literal["black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink"]
T = TypeVar("T")
CARDS = 0.2  # share of single colours where both kinds are included

# those of the cards of data=sample, under the same captions
PALETTE: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (220, 20, 20),
    "orange": (250, 130, 10),
    "yellow": (250, 230, 20),
    "green": (20, 160, 40),
    "blue": (20, 40, 220),
    "purple": (120, 20, 160),
    "pink": (255, 150, 190),
}
NUMBERS = ("one", "two", "three", "four")
SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle")
PLACES = {  # of a single body: its words, and where it lies across and down, from -1 to 1
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
CONTRAST = 150  # the least distance in RGB between bodies and background
CANVASES = ((8, 8), (10, 6), (6, 10), (12, 12))  # width, height in eighths of the native edge; aspects are buckets'
FINE = 8  # positions are whole eighths of a pixel
# of the short side: a body's size, and the gaps between bodies and to the border
SIZE, GAP, MARGIN = (0.22, 0.32), 0.1, 1 / 16

# settings of the data set and of evaluators that prompt for it
Numbers = Annotated[Sequence[Annotated[int, Field(ge=1, le=len(NUMBERS))]], Field(min_length=1)]
Colors = Annotated[Sequence[Color], Field(min_length=1)]
Shapes = Annotated[Sequence[Shape], Field(min_length=1)]


class Vocabulary(NamedTuple):
    """What scenes are drawn from: numbers of bodies, their colours and shapes, and backgrounds."""

    bodies: Sequence[int] = tuple(range(1, len(NUMBERS) + 1))
    colors: Sequence[Color] = get_args(Color)
    shapes: Sequence[Shape] = SHAPES
    backgrounds: Sequence[Color] = get_args(Color)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Body and background that are told apart easily. Raises UserError where no two of the colours are."""
        pairs = tuple((a, b) for a, b in product(self.colors, self.backgrounds) if contrast(a, b) >= CONTRAST)
        if not pairs:
            raise UserError(
                f"colors={list(self.colors)} backgrounds={list(self.backgrounds)}: no body stands out from its "
                "background; take others, such as colors=[white] backgrounds=[black]"
            )
        return pairs


EVERYTHING = Vocabulary()


class Scene(NamedTuple):
    """What a caption tells. `number` bodies of one colour and shape; of 0 bodies the background is all there is."""

    background: str
    number: int = 0
    colour: str = ""
    shape: str = ""
    place: str = ""  # of a single body

    @property
    def caption(self) -> str:
        if not self.number:
            return f"a completely {self.background} image"
        ground = f"{'an' if self.background[0] in 'aeiou' else 'a'} {self.background} background"
        bodies = f"{NUMBERS[self.number - 1]} {self.colour} {self.shape}"
        return f"{bodies} {self.place} of {ground}" if self.number == 1 else f"{bodies}s on {ground}"


def read(caption: str) -> Scene | None:
    """The truth of a caption; None if it is none of this data set."""
    if card := re.fullmatch(r"a completely (\w+) image", caption):
        return Scene(card[1]) if card[1] in PALETTE else None
    one = rf"(one) (\w+) (\w+) ({'|'.join(PLACES)}) of an? (\w+) background"
    several = r"(two|three|four) (\w+) (\w+)s() on an? (\w+) background"
    found = re.fullmatch(one, caption) or re.fullmatch(several, caption)
    if not found:
        return None
    number, colour, shape, place, background = found.groups()
    known = colour in PALETTE and background in PALETTE and shape in SHAPES
    return Scene(background, NUMBERS.index(number) + 1, colour, shape, place) if known else None


def contrast(one: str, other: str) -> float:
    """The distance of two named colours in RGB, 0 to 441."""
    return math.dist(PALETTE[one], PALETTE[other])


def draw_scene(draw: Draws, include: Sequence[Kind], words: Vocabulary = EVERYTHING) -> Scene:
    """The scene at one position: numbers of bodies, colours, shapes and places alike often."""
    if "shapes" not in include or ("colors" in include and draw.uniform("shapes card") < CARDS):
        return Scene(_pick(draw, "background", words.backgrounds))
    number = _pick(draw, "number", words.bodies)
    colour, background = _pick(draw, "colours", words.pairs)
    place = _pick(draw, "place", tuple(PLACES)) if number == 1 else ""
    return Scene(background, number, colour, _pick(draw, "shape", words.shapes), place)


def _pick(draw: Draws, purpose: str, options: Sequence[T]) -> T:
    return options[draw.choice(f"shapes {purpose}", len(options))]


# --- drawing ----------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the bodies of a scene lie: half their size, and each one's middle (x, y), in eighths of a pixel."""

    half: int
    middles: list[tuple[int, int]]


@dataclass(frozen=True)
class Picture:
    """A scene on a canvas of `width` x `height` pixels, both even."""

    scene: Scene
    width: int
    height: int
    draw: Draws

    @cached_property
    def layout(self) -> Layout:
        """Bodies that touch neither each other nor the border. They shrink where they find no room."""
        short = min(self.width, self.height) * FINE
        least, most = SIZE
        size = short * (least + (most - least) * self.draw.uniform("shapes size"))
        for attempt in count():
            half = int(size / 2 * (15 / 16) ** attempt)
            middles: list[tuple[int, int]] = []
            for body in range(self.scene.number):
                tried = (self._middle(half, f"{attempt} {body} {trial}") for trial in range(20))
                free = (m for m in tried if all(_apart(m, other, 2 * half + short * GAP) for other in middles))
                middles.extend(islice(free, 1))
            if len(middles) == self.scene.number:
                break
        return Layout(half, middles)

    def _middle(self, half: int, purpose: str) -> tuple[int, int]:
        """A random middle of a body; near the side that the scene names, if it does."""
        wanted = PLACES.get(self.scene.place, (None, None))
        margin = int(min(self.width, self.height) * FINE * MARGIN) + half
        sides = zip("xy", (self.width * FINE, self.height * FINE), wanted, strict=True)
        found = [self._along(f"shapes {axis} {purpose}", margin, side - margin, end) for axis, side, end in sides]
        return found[0], found[1]

    def _along(self, purpose: str, low: int, high: int, end: int | None) -> int:
        """A number in low..high, or in the eighth of it at its lower end, its upper end or around its middle."""
        share = self.draw.uniform(purpose)
        if end is not None:
            share = (end + 1) / 2 * 7 / 8 + share / 8
        return low + int((high - low) * share)

    def places(self) -> NDArray[np.uint8]:
        """[H, W] 0..15: how much of each pixel is body, from 4 x 4 points in it."""
        x = 2 * np.arange(4 * self.width, dtype=np.int64) + 1
        y = 2 * np.arange(4 * self.height, dtype=np.int64)[:, None] + 1
        inside = np.zeros((4 * self.height, 4 * self.width), bool)
        half, middles = self.layout
        for across, down in middles:
            inside |= _within(self.scene.shape, x - across, y - down, half)
        points = inside.reshape(self.height, 4, self.width, 4).sum(axis=(1, 3))
        return ((points * (COLOURS - 1) + 8) // 16).astype(np.uint8)

    def palette(self) -> NDArray[np.uint8]:
        """[16, 3]: from the background's colour to the bodies'."""
        ground = np.array(PALETTE[self.scene.background])
        body = np.array(PALETTE[self.scene.colour or self.scene.background])
        part, last = np.arange(COLOURS)[:, None], COLOURS - 1
        return ((ground * (last - part) + body * part + last // 2) // last).astype(np.uint8)

    def rgb(self) -> NDArray[np.uint8]:
        """[H, W, 3]."""
        return self.palette()[self.places()]


def _apart(one: tuple[int, int], other: tuple[int, int], least: float) -> bool:
    """Whether the boxes around two bodies are so far from each other."""
    return max(abs(one[0] - other[0]), abs(one[1] - other[1])) >= least


def _within(shape: str, x: NDArray[np.int64], y: NDArray[np.int64], half: int) -> NDArray[np.bool_]:
    """Which points, seen from the middle of a body, lie in it. It fills a box of 2 half x 2 half across or down."""
    if shape == "circle":
        return x * x + y * y <= half * half
    if shape == "square":
        return (abs(x) <= half * 7 // 8) & (abs(y) <= half * 7 // 8)
    return (2 * abs(x) <= y + half) & (y <= half)  # a triangle that stands on its side


def picture(
    seed: int, number: int, *, include: Sequence[Kind], resolution: int, words: Vocabulary = EVERYTHING
) -> Picture:
    """Number `number` of the data set of this seed for a model of native edge `resolution`, a multiple of 16 pixels."""
    draw = draws(seed, number)
    width, height = (resolution * eighths // 8 for eighths in _pick(draw, "canvas", CANVASES))
    return Picture(draw_scene(draw, include, words), width, height, draw)
