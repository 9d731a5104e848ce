"""Pictures as they are: batches of pixels for what is trained on images without captions, such as an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nai_xl.data.bucketing import cover
from nai_xl.data.images import UNREADABLE, on_canvas, picture, reopen, to_pixels, why
from nai_xl.data.index import Index
from nai_xl.data.rows import Item
from nai_xl.interfaces import Bucket, Bucketing, Placement
from nai_xl.rng import Draws, draws


@dataclass(slots=True)
class PixelBatch:
    """Pictures of one canvas, with the random numbers that belong to their positions in the run."""

    pixels: Tensor  # [B,3,H,W] in [-1,1]
    noise: Tensor  # [B,4,H/8,W/8] standard normal float32, for latents
    position: Tensor  # [B] int64
    item: Tensor  # [B] int64: place of each picture in the index

    def __len__(self) -> int:
        return len(self.position)

    @property
    def canvas(self) -> tuple[int, int, int]:
        return self.pixels.shape[2], self.pixels.shape[3], 0

    def to(self, device: torch.device) -> PixelBatch:
        return PixelBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def pin_memory(self) -> PixelBatch:
        return PixelBatch(*(getattr(self, f.name).pin_memory() for f in fields(self)))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        for f in fields(self):
            getattr(self, f.name).record_stream(stream)


class PixelDataset(Dataset[PixelBatch]):
    """(position, item) of pictures that share a bucket -> a PixelBatch, whatever worker or rank asks.

    zoom: the largest magnification. Each sample is a crop, enlarged by a factor and at a place that its position draws;
    1 puts the whole picture on the canvas, as text-to-image training does. recolour: channels change places, brightness
    and contrast in most samples: more colours than a small set of photographs has.
    """

    def __init__(self, index: Index, bucketing: Bucketing, seed: int, *, zoom: float = 1.0, recolour: bool = False):
        self.index, self.bucketing, self.seed, self.zoom, self.recolour = index, bucketing, seed, zoom, recolour

    def __getitems__(self, where: Sequence[tuple[int, int]]) -> PixelBatch:
        positions, numbers = zip(*where, strict=True)
        samples = [draws(self.seed, position) for position in positions]
        pixels = torch.stack([self._picture(number, draw) for number, draw in zip(numbers, samples, strict=True)])
        shape = (4, pixels.shape[2] // 8, pixels.shape[3] // 8)
        noise = torch.stack([draw.noise(shape, "latent noise") for draw in samples])
        return PixelBatch(pixels, noise, torch.tensor(positions), torch.tensor(numbers))

    def _picture(self, number: int, draw: Draws) -> Tensor:
        item = self.index.items[number]
        places = self.bucketing.placements(*item.size)
        place = places[draw.choice("placement", len(places))]
        if self.zoom > 1:
            place = zoomed(place, item.size, self.zoom ** draw.uniform("zoom"), draw)
        pixels = to_pixels(on_canvas(reopen(item), place))
        return recoloured(pixels, draw) if self.recolour else pixels


def unreadable(item: Item) -> str | None:
    """Why an image cannot be read whole; None for one that can."""
    try:
        picture(item)
    except UNREADABLE as error:
        return f"not a whole image: {why(error)}"
    return None


def zoomed(place: Placement, size: tuple[int, int], factor: float, draw: Draws) -> Placement:
    """The placement of a picture of `size` that is `factor` times as long, cut where its position says."""
    bucket = place.bucket
    wide, high = cover(*size, Bucket(round(bucket.width * factor), round(bucket.height * factor)))
    left = draw.choice("zoom left", wide - bucket.width + 1)
    return Placement(bucket, (wide, high), (left, draw.choice("zoom top", high - bucket.height + 1)), place.flip)


def recoloured(pixels: Tensor, draw: Draws) -> Tensor:
    """[3,H,W] in [-1,1]. In 3 of 10 the channels change places, in half of them contrast and brightness change."""
    if draw.uniform("channels") < 0.3:
        order = sorted(range(3), key=lambda channel: draw.uniform(f"channel {channel}"))
        pixels = pixels[order]
    if draw.uniform("recolour") < 0.5:
        gain = torch.tensor([0.75 + 0.4 * draw.uniform(f"gain {channel}") for channel in range(3)])
        shift = torch.tensor([0.4 * draw.uniform(f"shift {channel}") - 0.2 for channel in range(3)])
        pixels = (pixels * gain[:, None, None] + shift[:, None, None]).clamp(-1, 1)
    return pixels
