"""Samples of the arms of a comparison side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import matplotlib.font_manager
from PIL import Image, ImageDraw, ImageFont

from nai_xl.compare.arms import ArmRuns
from nai_xl.compare.comparison import Comparison
from nai_xl.compare.figures.canvas import INK, Drawn
from nai_xl.evals.contact_sheet import CAPTION_HEIGHT, cells
from nai_xl.record.run_dir import RunDirectory

PROMPTS_SHOWN = 6
SAMPLE_HEIGHTS = (256, 512)  # pixels of an image, least and most


def last_sheet(arm: ArmRuns, seed: int) -> Image.Image | None:
    """The last sample grid of one run; None without any."""
    run = arm.runs.get(seed)
    grids = RunDirectory(run.path).newest_samples() if run is not None and run.path is not None else []
    if not grids:
        return None
    with Image.open(grids[-1]) as image:
        return image.convert("RGB")


def samples(found: Comparison, seed: int) -> Drawn | None:
    """A row for each of a few prompts, a column for each arm, all painted from the same noise after training with
    `seed`. None unless two arms have a grid. A grid with another layout is shown whole.
    """
    sheets = {arm.label: sheet for arm in found.arms if (sheet := last_sheet(arm, seed)) is not None}
    if len(sheets) < 2:
        return None
    names = found.names
    apart = {label: cells(sheet) for label, sheet in sheets.items()}
    count = min(map(len, apart.values()))
    if not count:
        return _side_by_side([[(names[label], sheet) for label, sheet in sheets.items()]], seed)
    shown = [(2 * i + 1) * count // (2 * min(count, PROMPTS_SHOWN)) for i in range(min(count, PROMPTS_SHOWN))]
    first = next(iter(apart.values()))
    rows = []
    for i in shown:
        row = [("training image", first[i].reference)] if first[i].reference is not None else []
        rows.append([*row, *((names[label], own[i].sample) for label, own in apart.items())])
    return _side_by_side(rows, seed, [first[i].caption for i in shown])


def _side_by_side(
    rows: Sequence[Sequence[tuple[str, Image.Image | None]]], seed: int, captions: Sequence[Image.Image] = ()
) -> Drawn:
    """All images in one picture, at equal heights. Drawn with Pillow: matplotlib takes seconds for so many axes."""
    high = min(
        SAMPLE_HEIGHTS[1], max(SAMPLE_HEIGHTS[0], max(image.height for row in rows for _, image in row if image))
    )
    widest = max(image.width / image.height for row in rows for _, image in row if image)
    wide, strip, gap = round(high * widest), 2 * CAPTION_HEIGHT if captions else 0, 14
    bold = matplotlib.font_manager.findfont("DejaVu Sans:bold")
    heading, label = ImageFont.truetype(bold, 34), ImageFont.truetype(bold, 24)
    names = ["\n+ ".join(name.split(" + ")) for name, _ in rows[0]]
    top = gap + 48 + 30 * max(name.count("\n") + 1 for name in names) + gap
    size = (gap + len(names) * (wide + gap), top + len(rows) * (high + strip + gap))
    sheet = Image.new("RGB", (max(size[0], 460), size[1]), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, gap), f"Samples with seed {seed}", fill=INK, font=heading)
    for j, name in enumerate(names):
        at = (gap + j * (wide + gap) + wide // 2, top - gap // 2)
        pen.multiline_text(at, name, fill=INK, font=_fitting(label, name, wide), anchor="md", align="center")
    for i, row in enumerate(rows):
        y = top + i * (high + strip + gap)
        for j, (_, image) in enumerate(row):
            if image is not None:
                shown = image.resize((round(high * image.width / image.height), high), Image.Resampling.LANCZOS)
                sheet.paste(shown, (gap + j * (wide + gap) + (wide - shown.width) // 2, y))
        if captions:
            text = captions[i].resize((2 * captions[i].width, strip), Image.Resampling.LANCZOS)
            sheet.paste(text, (gap, y + high))
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    return Drawn(png.getvalue())


def _fitting(font: ImageFont.FreeTypeFont, text: str, width: int) -> ImageFont.FreeTypeFont:
    """The same font, smaller if a line would be wider than its column."""
    longest = max(font.getlength(line) for line in text.split("\n"))
    return font if longest <= width else font.font_variant(size=max(11, int(font.size * width / longest)))
