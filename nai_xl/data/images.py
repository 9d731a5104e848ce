"""Pictures on their canvases, and as numbers."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nai_xl.interfaces import Placement


def on_canvas(image: Image.Image, placement: Placement) -> Image.Image:
    """The image resized, cut and, where the placement says so, mirrored."""
    left, top = placement.crop
    box = (left, top, left + placement.bucket.width, top + placement.bucket.height)
    canvas = image.resize(placement.resized, Image.Resampling.LANCZOS).crop(box)
    return ImageOps.mirror(canvas) if placement.flip else canvas


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as [3,H,W] float32 in [-1,1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
