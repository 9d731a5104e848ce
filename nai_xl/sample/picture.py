"""A painted picture as a file that says how it was made, and the size that a person asks for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket


def parse_size(text: str) -> Bucket:
    """ "160x96" -> a canvas 160 wide and 96 high. Raises UserError unless both are positive multiples of 8."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    size = Bucket(*map(int, found.groups())) if found else Bucket(0, 0)
    if min(size) == 0 or size.width % 8 or size.height % 8:
        raise UserError(f"--size {text}: give WIDTHxHEIGHT in multiples of 8 pixels, such as 160x96")
    return size


def save(image: Image.Image, settings: Mapping[str, str | float], folder: Path) -> Path:
    """Write a PNG that holds `settings`, named after its prompt, its seed and a hash of all the rest.

    Raises UserError when `folder` cannot be written.
    """
    notes = PngInfo()
    for key, value in settings.items():
        notes.add_itxt(key, str(value))
    words = "-".join(re.findall(r"\w+", str(settings["prompt"]).lower()))[:40] or "empty"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    path = folder / f"{words}-{settings['seed']}-{digest}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        image.save(path, pnginfo=notes)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}); give another folder") from error
    return path
