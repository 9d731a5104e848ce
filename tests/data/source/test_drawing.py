"""data=shapes: captions tell the truth about the pictures, and both are functions of (seed, number)."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nai_xl.data.bucketing import AspectBuckets, SquareBucket
from nai_xl.data.images import on_canvas, open_rgb
from nai_xl.data.source import drawing as shapes
from nai_xl.data.source.drawing import EVERYTHING, PALETTE, Picture, Scene, picture, read
from nai_xl.data.source.shapes import ShapesSource
from nai_xl.data.source.stored_png import stored_png
from nai_xl.errors import UserError
from nai_xl.rng import draws

measure = pytest.importorskip("skimage.measure", reason="the independent count of bodies")
BOTH: list[shapes.Kind] = ["shapes", "colors"]


def drawn(number: int, seed: int = 0, resolution: int = 128) -> Picture:
    return picture(seed, number, include=BOTH, resolution=resolution)


def bodies(pixels: np.ndarray, scene: Scene) -> np.ndarray:
    """Which pixels are nearer to the bodies' colour than to the background's."""
    far, near = (np.abs(pixels.astype(int) - PALETTE[c]).sum(2) for c in (scene.background, scene.colour))
    return near < far


@given(st.integers(0, 10**9), st.integers(0, 10**6))
def test_a_caption_is_read_back(number: int, seed: int) -> None:
    scene = drawn(number, seed).scene
    assert read(scene.caption) == scene


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "five red circles on a white background", "two red circle on a white background",
     "two mauve circles on a white background", "one red circle on a white background", "a completely mauve image"],
)  # fmt: skip
def test_other_captions_are_not_read(text: str) -> None:
    assert read(text) is None


@given(st.integers(0, 10**9))
def test_a_picture_shows_what_its_caption_says(number: int) -> None:
    """The bodies are counted by scikit-image; none touches another or the border, wherever they lie."""
    shown = drawn(number)
    pixels, scene = shown.rgb(), read(shown.scene.caption)
    assert scene is not None and pixels.shape == (shown.height, shown.width, 3)
    assert (pixels[0, 0] == PALETTE[scene.background]).all()
    if not scene.number:
        assert (pixels == PALETTE[scene.background]).all()
        return
    mask = bodies(pixels, scene)
    found = measure.regionprops(measure.label(mask))
    assert len(found) == scene.number
    assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()
    box_fill = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}[scene.shape]
    for body in found:
        assert (pixels[tuple(np.array(body.coords).mean(0).astype(int))] == PALETTE[scene.colour]).all()
        assert body.extent == pytest.approx(box_fill, abs=0.08)


@given(st.sampled_from(sorted(shapes.PLACES)), st.integers(0, 10**6))
def test_a_single_body_is_where_the_caption_says(place: str, position: int) -> None:
    shown = Picture(Scene("white", 1, "red", "circle", place), 160, 96, draws(0, position))
    rows, columns = np.nonzero(bodies(shown.rgb(), shown.scene))
    x, y = columns.mean() / 160 * 2 - 1, rows.mean() / 96 * 2 - 1
    across, down = shapes.PLACES[place]
    for found, wanted in ((x, across), (y, down)):
        assert abs(found) < 0.2 if wanted == 0 else wanted * found > 0.25


def test_everything_occurs_about_as_often_as_it_should() -> None:
    scenes = [drawn(number).scene for number in range(2000)]
    cards = [scene for scene in scenes if not scene.number]
    assert len(cards) == pytest.approx(400, abs=80)  # 4.5 standard deviations
    assert {scene.background for scene in cards} == set(PALETTE)
    with_bodies = [scene for scene in scenes if scene.number]
    for number in (1, 2, 3, 4):
        assert sum(scene.number == number for scene in with_bodies) == pytest.approx(400, abs=80)
    assert {(scene.colour, scene.background) for scene in with_bodies} == set(EVERYTHING.pairs)
    assert {scene.shape for scene in with_bodies} == set(shapes.SHAPES)
    assert {(drawn(n).width, drawn(n).height) for n in range(100)} == {(128, 128), (160, 96), (96, 160), (192, 192)}


def test_the_pictures_are_the_same_on_every_machine() -> None:
    """The bytes of three files, pinned: raise shapes.VERSION when they change on purpose."""
    shown = [drawn(number) for number in (0, 3, 5)]
    content = [stored_png(p.places(), p.palette()) for p in shown]
    assert [hashlib.sha256(c).hexdigest()[:12] for c in content] == PINNED


PINNED = ["9ae4b3b806fe", "390de8d4f0e7", "fcedfcc3fde7"]


def test_only_what_is_included_is_drawn() -> None:
    for include, expected in ((["shapes"], {True}), (["colors"], {False})):
        found = {bool(picture(0, n, include=include, resolution=128).scene.number) for n in range(50)}  # type: ignore[arg-type]
        assert found == expected


def test_fewer_things_can_be_asked_for(tmp_path: Path) -> None:
    less = ShapesSource(64, count=30, bodies=[1, 2], colors=["black", "white"], shapes=["circle"], cache=tmp_path)
    source = replace(less, backgrounds=["black", "red"])
    scenes = [read(item.caption) for item in source.scan().items]
    assert {(s.number, s.shape) for s in scenes if s and s.number} == {(1, "circle"), (2, "circle")}
    assert {s.background for s in scenes if s} == {"black", "red"}
    assert {s.colour for s in scenes if s and s.number} == {"black", "white"}
    whole = ShapesSource(64, count=30, cache=tmp_path).scan()
    assert whole.items[0].path.parent != source.scan().items[0].path.parent


def test_bodies_need_a_colour_that_stands_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no body stands out from its background"):
        ShapesSource(64, count=30, colors=["red"], backgrounds=["orange"], cache=tmp_path).scan()


def test_square_crops_cut_bodies_that_aspect_buckets_keep() -> None:
    def cut(bucketing: AspectBuckets | SquareBucket) -> int:
        count = 0
        for number in range(200):
            shown = drawn(number)
            if shown.scene.number:
                image = Image.fromarray(shown.rgb())
                pixels = np.asarray(on_canvas(image, bucketing.placements(*image.size)[0]))
                mask = bodies(pixels, shown.scene)
                count += bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())
        return count

    assert cut(AspectBuckets(128, 32)) == 0
    assert cut(SquareBucket(128)) > 30


@pytest.mark.parametrize(("resolution", "step"), [(128, 32), (512, 64), (1024, 64)])
def test_canvases_have_the_aspects_of_buckets(resolution: int, step: int) -> None:
    bucketing = AspectBuckets(resolution, step)
    for width, height in shapes.CANVASES:
        size = width * resolution // 8, height * resolution // 8
        bucket = bucketing.assign(*size)
        assert bucket.width / bucket.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_the_data_set_is_written_once_and_whole(tmp_path: Path) -> None:
    source = ShapesSource(128, count=20, cache=tmp_path)
    index = source.scan()
    assert len(index.items) + len(index.held_out) == 20 and not index.skipped
    assert index.held_out or index.items
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert len(times) == 40
    lost = sorted(times)[5]
    lost.unlink()
    assert source.scan() == index
    assert {path for path in times if path.stat().st_mtime_ns == times[path]} >= times.keys() - {
        lost.with_suffix(".png"),
        lost.with_suffix(".txt"),
    }
    for item in index.items[:5]:
        number = int(item.path.stem)
        assert (np.asarray(open_rgb(item.path)) == drawn(number).rgb()).all()
        assert item.caption == drawn(number).scene.caption


def test_other_settings_are_other_folders(tmp_path: Path) -> None:
    def fingerprint(**changed: object) -> str:
        settings = {"resolution": 128, "count": 10, "cache": tmp_path, "held_out": 0.0, **changed}
        return ShapesSource(**settings).scan().fingerprint()  # type: ignore[arg-type]

    found = [fingerprint(), fingerprint(seed=1), fingerprint(resolution=256), fingerprint(include=["shapes"])]
    assert len(set(found)) == 4
    assert fingerprint() == found[0]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.cache=DIR.*NAI_XL_CACHE"):
        ShapesSource(128, count=1, cache=tmp_path / "file").scan()
