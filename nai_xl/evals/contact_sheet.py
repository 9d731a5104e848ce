"""A contact sheet: samples in a grid with their prompts; made while training, taken apart to set arms side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from nai_xl.interfaces import Bucket

CAPTION_HEIGHT, GAP, COLUMNS = 34, 6, 4


@dataclass(frozen=True)
class Prompt:
    """A text, its canvas, and the training image it was taken from, if any."""

    text: str
    bucket: Bucket
    reference: Image.Image | None = None


def contact_sheet(prompts: Sequence[Prompt], samples: Sequence[Image.Image]) -> Image.Image:
    """Samples in a grid, each with its training image to the left where there is one, and its prompt below."""
    side = max(max(sample.size) for sample in samples)
    both = any(prompt.reference for prompt in prompts)
    width = (2 * side + 2 if both else side) + GAP
    height = side + CAPTION_HEIGHT + GAP
    columns = min(COLUMNS, len(samples))
    sheet = Image.new("RGB", (columns * width + GAP, -(-len(samples) // columns) * height + GAP), "white")
    for i, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        if prompt.reference:
            _paste_centred(sheet, prompt.reference, left, top, side)
        _paste_centred(sheet, sample, left + (side + 2 if both else 0), top, side)
        sheet.paste(_caption(prompt.text or "(empty prompt)", width - GAP), (left, top + side))
    return sheet


def _caption(text: str, width: int) -> Image.Image:
    """`text` in black on white, `width` x CAPTION_HEIGHT, smaller where it needs more room; cut where it still does."""
    strip = Image.new("RGB", (width, CAPTION_HEIGHT), "white")
    for size in (11, 10, 9, 8):
        font = ImageFont.load_default(size=size)
        lines = textwrap.wrap(text, max(4, int(width / font.getlength("e"))), break_long_words=False)
        fits = all(font.getlength(line) <= width for line in lines) and len(lines) * (size + 4) <= CAPTION_HEIGHT
        if fits:
            break
    ImageDraw.Draw(strip).multiline_text((0, 3), "\n".join(lines), fill="black", font=font, spacing=2)
    return strip


def unavailable(bucket: Bucket, words: str) -> Image.Image:
    """A grey picture that says why there is none."""
    cell = Image.new("RGB", bucket, (160, 160, 160))
    strip = _caption(words, bucket.width)
    cell.paste(strip, (0, (bucket.height - strip.height) // 2))
    return cell


def _paste_centred(sheet: Image.Image, image: Image.Image, left: int, top: int, side: int) -> None:
    sheet.paste((236, 236, 236), (left, top, left + side, top + side))
    sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))


# --- taken apart ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One prompt of a contact sheet."""

    sample: Image.Image
    reference: Image.Image | None  # the training image
    caption: Image.Image


def cells(sheet: Image.Image) -> list[Cell]:
    """A contact sheet taken apart, row by row; empty where its size is not that of one. Empty places are left out."""
    layout = _layout(sheet.size)
    if layout is None:
        return []
    rows, columns, side, both = layout
    width, height = (2 * side + 2 if both else side) + GAP, side + CAPTION_HEIGHT + GAP
    found = []
    for i in range(rows * columns):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        box = sheet.crop((left, top, left + width - GAP, top + side))
        if box.convert("L").getextrema() == (255, 255):
            continue
        shift = side + 2 if both else 0
        caption = sheet.crop((left, top + side, left + width - GAP, top + side + CAPTION_HEIGHT))
        sample = box.crop((shift, 0, shift + side, side))
        found.append(Cell(sample, box.crop((0, 0, side, side)) if both else None, caption))
    return found


def _layout(size: tuple[int, int]) -> tuple[int, int, int, bool] | None:
    """Rows, columns, a cell's side, and whether training images stand beside the samples."""
    width, height = size[0] - GAP, size[1] - GAP
    for rows in range(1, 64):
        side = height // rows - CAPTION_HEIGHT - GAP
        if height % rows or side < 8 or side % 8:
            continue
        for both in (True, False):
            cell = (2 * side + 2 if both else side) + GAP
            columns = width // cell
            if width % cell == 0 and 1 <= columns <= COLUMNS and (rows == 1 or columns == COLUMNS):
                return rows, columns, side, both
    return None
