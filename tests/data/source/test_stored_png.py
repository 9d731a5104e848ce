"""Uncompressed PNG files, read back by Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from nai_xl.data.source.stored_png import stored_png


@pytest.mark.parametrize("size", [(2, 1), (96, 160), (600, 700)])  # the last is longer than one stored block
def test_pillow_reads_back_what_was_written(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    places = random.integers(0, 16, (size[1], size[0]), dtype=np.uint8)
    palette = random.integers(0, 256, (16, 3), dtype=np.uint8)
    content = stored_png(places, palette)
    with Image.open(io.BytesIO(content)) as image:
        image.verify()  # every chunk's check sum
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == size
        assert (np.asarray(image.convert("RGB")) == palette[places]).all()
    assert len(content) < size[0] * size[1] / 2 + size[1] + 200
