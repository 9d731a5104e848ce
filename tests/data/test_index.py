"""Reading a folder of images: every common format as it is meant to be seen, every bad file left out with a reason."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nai_xl.data.images import UNREADABLE, open_rgb
from nai_xl.data.index import Index
from nai_xl.data.source.folder import scan
from nai_xl.errors import UserError

ORIENTATION = 0x0112


def picture(width: int = 40, height: int = 24) -> Image.Image:
    """A smooth gradient, so that lossy formats come near it."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def put(folder: Path, name: str, image: Image.Image | None = None, caption: str = "a cat", **save: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **save)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def only(folder: Path) -> tuple[str, str]:
    """File name and reason of the one skipped image."""
    (skip,) = scan(folder).skipped
    return skip.path.name, skip.reason


def assert_near(found: Image.Image, expected: Image.Image, tolerance: float) -> None:
    assert found.mode == "RGB"
    assert found.size == expected.size
    difference = np.asarray(found, dtype=float) - np.asarray(expected, dtype=float)
    assert np.abs(difference).mean() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_rotation_is_applied_to_the_picture_and_its_size(tmp_path: Path, suffix: str, orientation: int) -> None:
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # what Pillow must do to undo each
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = put(tmp_path, f"turned{suffix}", exif=exif, quality=95)
    expected = picture() if orientation == 1 else picture().transpose(Image.Transpose(turns[orientation]))
    assert_near(open_rgb(path), expected, 4)
    assert scan(tmp_path).items[0].size == expected.size


@pytest.mark.parametrize("value", [0, 9, 1000])
def test_meaningless_exif_rotation_is_ignored_by_size_and_picture_alike(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    path = put(tmp_path, "odd.jpg", exif=exif)
    assert scan(tmp_path).items[0].size == open_rgb(path).size == (40, 24)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear, half = Image.new("RGBA", (20, 20), (255, 0, 0, 0)), Image.new("RGBA", (20, 20), (200, 0, 0, 128))
    assert open_rgb(put(tmp_path, "clear.png", clear)).getpixel((3, 3)) == (255, 255, 255)
    assert open_rgb(put(tmp_path, "half.png", half)).getpixel((3, 3)) == pytest.approx((227, 127, 127), abs=1)
    assert open_rgb(put(tmp_path, "half.webp", half, lossless=True)).getpixel((3, 3)) == pytest.approx(
        (227, 127, 127), abs=1
    )
    grey = Image.new("LA", (20, 20), (0, 0))
    assert open_rgb(put(tmp_path, "grey.png", grey)).getpixel((3, 3)) == (255, 255, 255)


def test_palette_with_a_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((5, 5), 1)
    found = open_rgb(put(tmp_path, "palette.png", image, transparency=0))
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((5, 5)) == (200, 100, 50)


def test_rgb_with_a_colour_key_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20), (1, 2, 3))
    image.putpixel((5, 5), (200, 100, 50))
    found = open_rgb(put(tmp_path, "keyed.png", image, transparency=(1, 2, 3)))
    assert (found.getpixel((0, 0)), found.getpixel((5, 5))) == ((255, 255, 255), (200, 100, 50))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.zeros((20, 20), dtype=np.uint16)
    values[:, 5:10], values[:, 10:] = 32768, 65535
    found = open_rgb(put(tmp_path, "deep.png", Image.fromarray(values)))
    assert [found.getpixel((x, 3))[0] for x in (0, 19)] == [0, 255]  # type: ignore[index]
    assert found.getpixel((7, 3))[0] in (127, 128)  # type: ignore[index]


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_jpeg_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = picture().convert(mode)
    assert_near(open_rgb(put(tmp_path, "x.jpg", image, quality=95)), image.convert("RGB"), 4)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_png_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = picture().convert(mode)
    assert_near(open_rgb(put(tmp_path, "x.png", image)), image.convert("RGB"), 0)


def test_webp_is_read(tmp_path: Path) -> None:
    assert_near(open_rgb(put(tmp_path, "x.webp", quality=95)), picture(), 4)


def test_images_are_found_below_the_folder_by_any_case_of_their_suffix(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/10.png", "a/z.JPEG", "c.webp"):
        put(tmp_path, name, caption=f"  {name}\n")
    (tmp_path / "notes.md").write_text("not an image")
    index = scan(tmp_path)
    assert {item.caption for item in index.items} == {"c.webp", "a/z.JPEG", "b/10.png", "b/2.PNG"}
    assert [(row.path.name, row.reason) for row in index.skipped] == [("notes.md", "not an image")]
    assert index.remarks == ["not images: 1 .md; listed in skipped.csv"]


def test_captions_may_be_empty_or_in_any_script_or_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    captions = ["", "猫 кот 🐈", "two\nlines"]
    for i, caption in enumerate(captions):
        put(tmp_path, f"{i}.png", caption=caption)
    put(tmp_path, "3.png").with_suffix(".txt").write_text("a dog", encoding="utf-8-sig")
    assert {item.caption for item in scan(tmp_path).items} == {*captions, "a dog"}


def test_a_renamed_file_keeps_its_place(tmp_path: Path) -> None:
    for i in range(5):
        put(tmp_path, f"{i}.png", caption=f"number {i}")
    before = [item.caption for item in scan(tmp_path).items]
    (tmp_path / "0.png").rename(tmp_path / "z.png")
    (tmp_path / "0.txt").rename(tmp_path / "z.txt")
    assert [item.caption for item in scan(tmp_path).items] == before


def test_missing_and_undecodable_captions_are_skipped_with_a_reason(tmp_path: Path) -> None:
    put(tmp_path, "good.png")
    bare = put(tmp_path, "bare.png").with_suffix(".txt")
    bare.unlink()
    assert only(tmp_path) == ("bare.png", "no caption file bare.txt")
    bare.write_bytes("schöne Katze".encode("latin-1"))
    assert only(tmp_path) == (
        "bare.png",
        "caption file bare.txt is not UTF-8; data.encoding=cp1252 reads what Windows has written",
    )
    bare.unlink()
    bare.mkdir()
    assert only(tmp_path) == ("bare.png", "no caption file bare.txt")


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_corrupt_images_are_skipped_with_a_reason(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, "good.png")
    put(tmp_path, "bad.png").write_bytes(content)
    name, reason = only(tmp_path)
    assert name == "bad.png"
    assert reason.startswith("not a readable image: ")


def test_images_that_are_too_small_are_skipped_naming_the_setting(tmp_path: Path) -> None:
    put(tmp_path, "good.png")
    put(tmp_path, "dot.png", picture(1, 1))
    assert only(tmp_path) == ("dot.png", "1x1 pixels; data.min_side is 16")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_truncated_image_is_refused_when_it_is_read_whole(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = put(tmp_path, f"cut{suffix}", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UNREADABLE):
        open_rgb(path)


def test_images_that_turn_out_unusable_leave_the_index_with_their_reasons(tmp_path: Path) -> None:
    paths = [put(tmp_path, f"{i}.png") for i in range(3)]
    index = scan(tmp_path).without({paths[1]: "not a whole image"})
    assert [item.path for item in index.items] == [paths[0], paths[2]]
    index.skipped.write(tmp_path / "skipped.csv")
    with (tmp_path / "skipped.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["file", "reason"], [str(paths[1]), "not a whole image"]]


def test_folder_without_usable_images_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.dir=.*no images"):
        scan(tmp_path)
    put(tmp_path, "bare.png").with_suffix(".txt").unlink()
    with pytest.raises(UserError, match=r"none of 1 images can be used\. bare\.png: no caption file bare\.txt"):
        scan(tmp_path)


def test_fingerprint_follows_pixels_and_captions_and_not_names(tmp_path: Path) -> None:
    first = tmp_path / "first"
    put(first, "a.png", picture(30, 30), caption="one")
    put(first, "b.png", picture(40, 40), caption="two")

    def fingerprint(folder: Path) -> str:
        return scan(folder).fingerprint()

    second = shutil.copytree(first, tmp_path / "second")
    for suffix in (".png", ".txt"):
        (second / f"a{suffix}").rename(second / f"z{suffix}")
    assert fingerprint(second) == fingerprint(first)
    (second / "z.txt").write_text("another")
    assert fingerprint(second) != fingerprint(first)
    third = shutil.copytree(first, tmp_path / "third")
    put(third, "a.png", picture(30, 31), caption="one")
    assert fingerprint(third) != fingerprint(first)
    swapped = shutil.copytree(first, tmp_path / "swapped")
    (swapped / "a.txt").write_text("two")
    (swapped / "b.txt").write_text("one")
    assert fingerprint(swapped) != fingerprint(first)
    assert len(Index([]).fingerprint()) == len(fingerprint(first)) == 16


def test_a_caption_of_megabytes_is_skipped_unread_and_named_with_the_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "fine.png", caption="x" * 65536)
    put(tmp_path, "short.png")
    long = put(tmp_path, "long.png").with_suffix(".txt")
    long.write_bytes(b"a cat " * ((20 << 20) // 6))
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, **how: pytest.fail("read") if path == long else read(path, **how)
    )
    assert only(tmp_path) == ("long.png", f"caption file of {long.stat().st_size} bytes; data.max_caption is 65536")
    assert len(scan(tmp_path, max_caption=65535).skipped) == 2


def test_a_picture_above_the_limit_is_named_with_the_override_that_raises_it(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    put(tmp_path, "small.png")
    huge = put(tmp_path, "huge.png", Image.new("1", (20000, 10001)))  # more than Pillow opens by itself
    assert only(tmp_path) == ("huge.png", "20000x10001 pixels; data.max_megapixels is 100")
    assert {item.path.name for item in scan(tmp_path, max_megapixels=201).items} == {
        "small.png",
        huge.name,
    }
    assert not recwarn
