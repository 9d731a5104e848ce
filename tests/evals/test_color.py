"""evals=color on pictures whose colour is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nai_xl.data.source.drawing import PALETTE, read
from nai_xl.diffusion.sampling import Sampling
from nai_xl.evals.color import Color, color_error
from nai_xl.evals.painter import Painter, Studio
from nai_xl.record.items import read_items

byte = st.integers(0, 255)
colour = st.tuples(byte, byte, byte)
Make = Callable[..., Studio]


@given(colour, colour)
def test_the_error_of_a_constant_image_is_the_distance_of_the_colours(shown: Any, wanted: Any) -> None:
    pixels = np.full((16, 24, 3), shown, np.uint8)
    expected = np.linalg.norm((np.array(shown) - wanted) / 255) / np.sqrt(3)
    assert color_error(pixels, wanted) == pytest.approx(expected, abs=1e-12)


def test_only_the_mean_counts() -> None:
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    assert color_error(half, (127, 128, 128)) < 0.01
    assert color_error(half, (0, 0, 0)) == pytest.approx(0.5)


class Photographer:
    """Paints what it is asked for as it is told to, and notes what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, paint: Callable[[str], tuple[int, int, int]]):
        self.asked: list[tuple[str, Any, int, Sampling]] = []

        def painted(studio: Painter, prompts: Any, seed: int, *, batch: int) -> list[Image.Image]:
            self.asked += [(p.text, p.bucket, seed, studio.sampling) for p in prompts]
            return [Image.new("RGB", tuple(p.bucket), paint(p.text)) for p in prompts]

        monkeypatch.setattr(Painter, "paint", painted)


def prompted(text: str) -> tuple[int, int, int]:
    scene = read(text)
    assert scene is not None
    return PALETTE[scene.background]


def test_the_right_colours_have_no_error_and_the_whole_range(studio: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Photographer(monkeypatch, prompted).asked
    values = Color(every=1, seeds=2, steps=3).run(1, studio())
    assert values["color/error"] == 0 and all(values[f"color/error_{name}"] == 0 for name in PALETTE)
    assert values["color/luminance_range"] == pytest.approx(1)
    assert values["color/luminance_min"] == 0
    assert len(asked) == 2 * len(PALETTE) and {seed for _, _, seed, _ in asked} == {0, 1}
    assert {sampling.steps for *_, sampling in asked} == {3}


def test_a_model_of_medium_brightness_is_seen_as_one(
    studio: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everything half way to grey: half of the error of grey, half of the range."""
    Photographer(monkeypatch, lambda text: tuple(round((c + 127.5) / 2) for c in prompted(text)))  # type: ignore[arg-type,return-value]
    values = Color(every=1, sizes=(1, 2)).run(5, studio())
    assert values["color/luminance_range"] == values["color/luminance_range_2x"] == pytest.approx(0.5, abs=0.01)
    assert values["color/error_black"] == pytest.approx(0.25, abs=0.01)
    items = read_items(tmp_path, "color/error")[5]
    assert set(items) == {f"{name}/0" for name in PALETTE}
    assert values["color/error"] == pytest.approx(np.mean(list(items.values())))
    assert values["color/error_white"] == items["white/0"]


def test_wording_and_colours_can_be_chosen(studio: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Photographer(monkeypatch, lambda text: PALETTE[text.split()[2]]).asked
    evaluator = Color(every=1, colors=["red", "blue"], wording="a solid {} image", sizes=(1.5,))
    values = evaluator.run(1, studio())
    assert [text for text, *_ in asked] == ["a solid red image", "a solid blue image"] == evaluator.texts([])
    assert {tuple(bucket) for _, bucket, *_ in asked} == {(96, 96)}
    assert values["color/error_1.5x"] == 0


def test_noise_is_of_prompt_and_seed_however_many_are_painted_together(studio: Make) -> None:
    """A network that predicts v = x_t lets its noise through, and decoding shows it."""

    def bright(latents: torch.Tensor) -> list[Image.Image]:
        return [Image.fromarray(((x[:3].tanh() + 1) * 127).byte().permute(1, 2, 0).numpy()) for x in latents]

    def run(batch: int, seeds: int) -> dict[str, float]:
        scene = studio(decode=bright, denoise=lambda xt, *_, **__: (xt,), run_dir=studio().run_dir / f"{batch}-{seeds}")
        Color(every=1, seeds=seeds, steps=2, batch=batch).run(1, scene)
        return read_items(scene.run_dir, "color/luminance")[1]

    one, three = run(16, 1), run(3, 2)
    assert len(set(three.values())) == 20
    assert {name: three[name] for name in one} == one
