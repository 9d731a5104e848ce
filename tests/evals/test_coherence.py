"""Counting bodies, against a flood fill and on drawn pictures whose number is known; the tiny autoencoder's share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from nai_xl.data.images import to_pixels
from nai_xl.data.source.drawing import Picture, Scene, contrast, picture, read
from nai_xl.evals.bodies import Bodies, find_bodies
from nai_xl.evals.coherence import Coherence
from nai_xl.evals.painter import Painter, Studio
from nai_xl.model.tiny import _vae
from nai_xl.model.vae import decode_latents, encode_pixels
from nai_xl.record.items import read_items
from nai_xl.rng import draws

Make = Callable[..., Studio]


def threshold(scene: Scene) -> float:
    return contrast(scene.colour, scene.background) / 2


def flooded(mask: Any) -> list[set[tuple[int, int]]]:
    """The regions of a mask, each found by going from pixel to neighbouring pixel, over sides and corners."""
    left, regions = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        regions.append(region)
    return regions


@given(arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20))), st.booleans())
def test_bodies_are_the_regions_of_a_flood_fill(mask: Any, framed: bool) -> None:
    """20 x 20 pixels have no specks. Without a frame around them, the background may be either colour."""
    mask = np.pad(mask, 1) if framed else mask
    pixels = np.where(mask, 255, 0).astype(np.uint8)[:, :, None].repeat(3, 2)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    regions = flooded(np.abs(pixels[:, :, 0] - np.median(rim)) > 100)
    last = (mask.shape[0] - 1, mask.shape[1] - 1)
    cut = [region for region in regions if any(y in (0, last[0]) or x in (0, last[1]) for y, x in region)]
    large = [region for region in regions if len(region) > mask.size / 400]
    assert find_bodies(pixels, 100).count == len(large)
    assert find_bodies(pixels, 100).cut == len([region for region in cut if region in large])


def test_a_long_winding_region_is_one() -> None:
    measure = pytest.importorskip("skimage.measure")
    spiral = np.zeros((105, 105), bool)
    inner = spiral[2:-2, 2:-2]
    for turn in range(0, 50, 4):
        inner[turn, turn : 101 - turn] = inner[turn : 101 - turn, 100 - turn] = True
        inner[100 - turn, turn : 101 - turn] = inner[turn + 4 : 101 - turn, turn] = True
        inner[turn + 4, turn : turn + 4] = True
    regions = measure.regionprops(measure.label(spiral, connectivity=2))
    large = [region for region in regions if region.area > spiral.size / 400]
    pixels = np.where(spiral, 255, 0).astype(np.uint8)[:, :, None].repeat(3, 2)
    assert find_bodies(pixels, 100) == Bodies(len(large), 0) and max(region.area for region in large) > 2000


@given(st.integers(0, 10**9))
def test_drawn_bodies_are_counted(number: int) -> None:
    shown = picture(0, number, include=["shapes"], resolution=128)
    assert find_bodies(shown.rgb(), threshold(shown.scene)) == Bodies(shown.scene.number, 0)


@given(st.integers(0, 10**6), st.sampled_from([(0, 1), (0, -1), (1, 1), (1, -1)]))
def test_a_body_pushed_over_the_border_is_cut(position: int, side: tuple[int, int]) -> None:
    """Cut off the picture up to the body's middle, from any side."""
    shown = Picture(Scene("grey", 1, "yellow", "circle", "in the middle"), 128, 128, draws(0, position))
    axis, direction = side
    middle = shown.layout.middles[0][1 - axis] // 8
    pixels = shown.rgb().swapaxes(0, axis)
    cut = (pixels[middle:] if direction > 0 else pixels[:middle]).swapaxes(0, axis)
    assert find_bodies(cut, threshold(shown.scene)) == Bodies(1, 1)


def test_specks_and_a_drifting_background_are_no_bodies() -> None:
    pixels = np.full((128, 128, 3), 200, np.uint8)
    pixels[:, :, 0] = np.linspace(180, 220, 128).astype(np.uint8)
    pixels[60:63, 60:63] = 0
    assert find_bodies(pixels, 100) == Bodies(0, 0)
    pixels[20:40, 20:40] = 0
    assert find_bodies(pixels, 100) == Bodies(1, 0)


def test_the_tiny_autoencoder_keeps_the_bodies_apart() -> None:
    """What it does to the measure by itself: on decoded truths the number is right nearly always, and none is cut."""
    shown = [picture(0, n, include=["shapes"], resolution=128) for n in range(60)]
    square = [p for p in shown if (p.width, p.height) == (128, 128)]
    vae = _vae()
    pixels = torch.stack([to_pixels(Image.fromarray(p.rgb())) for p in square])
    decoded = decode_latents(vae, encode_pixels(vae, pixels))
    found = [find_bodies(np.asarray(image), threshold(p.scene)) for image, p in zip(decoded, square, strict=True)]
    right = [f.count == p.scene.number for f, p in zip(found, square, strict=True)]
    assert len(square) > 8 and np.mean(right) > 0.9
    assert sum(f.cut for f in found) == 0


def test_prompts_are_of_all_numbers_alike_and_always_the_same() -> None:
    evaluator = Coherence(every=1, count=10)
    scenes = [read(text) for text in evaluator.texts([])]
    numbers = [scene.number for scene in scenes if scene]
    assert [numbers.count(n) for n in (1, 2, 3, 4)] == [3, 3, 2, 2]
    assert Coherence(every=1, count=10).prompts() == evaluator.prompts()


def test_prompts_can_be_of_fewer_things() -> None:
    evaluator = Coherence(every=1, count=5, bodies=[3, 1], colors=["black", "white"], shapes=["circle"])
    scenes = [scene for text in evaluator.texts([]) if (scene := read(text))]
    assert sorted(scene.number for scene in scenes) == [1, 1, 1, 3, 3]
    assert {(scene.shape, scene.colour) for scene in scenes} <= {("circle", "black"), ("circle", "white")}


@pytest.mark.parametrize("surplus", [-1, 0, 1])
def test_what_it_says_of_painted_truths(studio: Make, monkeypatch: pytest.MonkeyPatch, surplus: int) -> None:
    def painted(_: Painter, prompts: Any, seed: int, *, batch: int) -> list[Image.Image]:
        images = []
        for prompt in prompts:
            scene = read(prompt.text)
            assert scene is not None
            number = max(1, scene.number + surplus)
            images.append(Picture(scene._replace(number=number, place=""), *prompt.bucket, draws(seed, 1)).rgb())
        return [Image.fromarray(image) for image in images]

    monkeypatch.setattr(Painter, "paint", painted)
    scene = studio()
    values = Coherence(every=1, count=8, sizes=(1, 2)).run(4, scene)
    wrong = {-1: 0.75, 0: 0, 1: 1}[surplus]  # of the prompted one body there is still one
    for suffix in ("", "_2x"):
        assert values[f"coherence/count_error{suffix}"] == wrong
        assert values[f"coherence/too_many{suffix}"] == (surplus > 0)
        assert values[f"coherence/right{suffix}"] == 1 - wrong
        assert values[f"coherence/cut{suffix}"] == 0
    items = read_items(scene.run_dir, "coherence/count_error_2x")[4]
    assert len(items) == 8 and sum(items.values()) == 8 * wrong


def test_a_sample_without_any_body_is_good_by_no_measure() -> None:
    """An arm that paints nothing must not win; what is measured beside that is the mean less coherence/empty."""
    evaluator = Coherence(every=1, count=4)
    name, scene = next(iter(evaluator.scenes.items()))
    values = evaluator.measure(name, Picture(scene, 128, 128, draws(0, 1)).rgb() * 0)
    assert values == {
        "coherence/count_error": scene.number,
        "coherence/right": False,
        "coherence/too_many": True,
        "coherence/cut": 1,
        "coherence/empty": True,
    }
    whole = evaluator.measure(name, Picture(scene, 128, 128, draws(0, 1)).rgb())
    assert not whole["coherence/empty"] and not whole["coherence/too_many"] and whole["coherence/cut"] == 0
    assert set(values) == set(evaluator.better)
