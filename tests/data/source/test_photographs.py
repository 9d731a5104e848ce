"""The sample data set: what is in it, and that it is written whole, once, and never over other files."""

import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nai_xl.data.source import photographs as sample
from nai_xl.errors import UserError

SUFFIXES = {".png", ".jpg"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set for the tests that only read."""
    pytest.importorskip("skimage")
    return sample.write_sample(tmp_path_factory.mktemp("cache") / "sample")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of four pictures, for the tests that write: encoding them all takes half a second each time."""
    pytest.importorskip("skimage")
    stems = {"cat", "coffee", "rocket", "card_red"}
    monkeypatch.setattr(sample, "RECIPE", tuple(item for item in sample.RECIPE if item.stem in stems))


@pytest.fixture
def folder(short: None, tmp_path: Path) -> Path:
    """A short set for a test to spoil."""
    return sample.write_sample(tmp_path / "cache" / "sample")


def images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}


def aspect(path: Path) -> str:
    with Image.open(path) as image:
        ratio = image.width / image.height
    return min({"1:1": 1, "5:3": 5 / 3, "3:5": 3 / 5}.items(), key=lambda item: abs(ratio / item[1] - 1))[0]


def test_every_image_opens_as_rgb_and_has_a_caption(written: Path) -> None:
    assert 40 <= len(images(written)) <= 48
    assert len(images(written)) == len(sample.RECIPE)
    for path in images(written):
        with Image.open(path) as image:
            image.load()
            assert image.mode == "RGB"
            assert max(image.size) <= 512
            assert min(image.size) >= 96
        assert path.with_suffix(".txt").is_file()


def test_captions_are_plain_short_and_unique(written: Path) -> None:
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in images(written)]
    assert len(set(captions)) == len(captions)
    for caption in captions:
        assert caption == caption.lower()
        assert caption.replace(" ", "").replace(",", "").isalpha()
        assert 4 <= len(caption.split()) <= 14


def test_stems_are_unique() -> None:
    stems = [item.stem for item in sample.RECIPE]
    assert len(set(stems)) == len(stems)


def test_at_least_twelve_images_of_each_aspect(written: Path) -> None:
    aspects = [aspect(path) for path in images(written)]
    assert {name: aspects.count(name) >= 12 for name in ("1:1", "5:3", "3:5")} == {
        "1:1": True,
        "5:3": True,
        "3:5": True,
    }


@pytest.mark.parametrize("crop", sample.CROPS, ids=lambda crop: crop.stem)
def test_crops_have_the_aspect_of_a_bucket(crop: sample.Crop) -> None:
    left, top, right, bottom = crop.box
    ratio = (right - left) / (bottom - top)
    assert min(abs(ratio / wanted - 1) for wanted in (1, 5 / 3, 3 / 5)) < 0.01


@pytest.mark.parametrize("card", sample.CARDS, ids=lambda card: card.stem)
def test_cards_are_of_one_colour(written: Path, card: sample.Card) -> None:
    with Image.open(written / card.file_name) as image:
        pixels = np.asarray(image)
    assert (pixels == np.array(card.colour, dtype=np.uint8)).all()


def test_named_colours_are_what_the_captions_say(written: Path) -> None:
    def mean(stem: str) -> tuple[float, ...]:
        with Image.open(written / f"{stem}.png") as image:
            return tuple(np.asarray(image).mean(axis=(0, 1)))

    assert mean("card_black") == (0, 0, 0)
    assert mean("card_white") == (255, 255, 255)
    assert np.argmax(mean("card_red")) == 0
    assert np.argmax(mean("card_green")) == 1
    assert np.argmax(mean("card_blue")) == 2
    assert len(set(mean("card_grey"))) == 1


def test_transparent_pixels_become_white(written: Path) -> None:
    with Image.open(written / "horse.png") as image:
        assert image.getpixel((0, 0)) == (255, 255, 255)  # beyond the rim of the photograph
        assert image.getpixel((2, 50)) == (255, 255, 255)  # inside it
        assert image.getpixel((200, 130)) == (0, 0, 0)


def test_second_call_writes_nothing_and_needs_no_scikit_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    before = times(folder)
    assert sample.write_sample(folder) == folder
    assert times(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["sample"]


@pytest.mark.parametrize("lost", [sample.MARKER, "cat.png", "cat.txt"])
def test_set_with_a_file_missing_is_written_anew(folder: Path, lost: str) -> None:
    (folder / lost).unlink()
    (folder / "coffee.png").write_bytes(b"half a pictu")
    sample.write_sample(folder)
    assert (folder / lost).is_file()
    with Image.open(folder / "coffee.png") as image:
        image.load()
    assert [path.name for path in folder.parent.iterdir()] == ["sample"]


def test_set_of_an_older_recipe_is_replaced(folder: Path) -> None:
    (folder / sample.MARKER).write_text("0123456789abcdef\nretired.png\nretired.txt\n", encoding="utf-8")
    (folder / "retired.png").write_bytes(b"")
    sample.write_sample(folder)
    assert not (folder / "retired.png").exists()


def test_other_files_are_never_deleted(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"mine\.png.*data\.cache=DIR"):
        sample.write_sample(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


@pytest.mark.usefixtures("short")
def test_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: sample.Card) -> Image.Image:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sample, "_fill", full)
        with pytest.raises(UserError, match="No space left"):
            sample.write_sample(tmp_path / "sample")
    assert not list(tmp_path.iterdir())
    sample.write_sample(tmp_path / "sample")
    assert len(images(tmp_path / "sample")) == len(sample.RECIPE)


@pytest.mark.parametrize("older", [False, True], ids=["no set before", "older set before"])
def test_set_of_a_quicker_process_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    theirs = Path(shutil.copytree(folder, tmp_path / "theirs"))
    (folder / sample.MARKER).unlink()
    if not older:
        shutil.rmtree(folder)
    write_files = sample._write_files

    def write_while_another_finishes(fresh: Path, sources: dict[str, Image.Image]) -> None:
        write_files(fresh, sources)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(theirs, folder)

    monkeypatch.setattr(sample, "_write_files", write_while_another_finishes)
    sample.write_sample(folder)
    assert times(folder)["cat.png"] == times(theirs)["cat.png"]  # copytree keeps times: theirs, not ours
    assert [path.name for path in folder.parent.iterdir()] == ["sample"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_folder_has_ordinary_permissions(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "sample", tmp_path / "file" / "deep" / "sample"):
        with pytest.raises(UserError) as caught:
            sample.write_sample(folder)
        message = str(caught.value)
        assert str(folder) in message
        assert "data.cache=DIR" in message
        assert "NAI_XL_CACHE" in message


def test_missing_scikit_image_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match=r"pip install 'nai_xl\[demo\]'"):
        sample.write_sample(tmp_path / "sample")
    assert not list(tmp_path.iterdir())


def test_wheel_without_its_pictures_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_wheel_data", lambda: tmp_path / "data")
    with pytest.raises(UserError, match=r"astronaut\.png.*nai_xl\[demo\]"):
        sample.write_sample(tmp_path / "sample")


def test_every_source_has_its_licence_listed() -> None:
    text = Path(__file__).parents[3].joinpath("docs", "sample_licences.md").read_text(encoding="utf-8")
    for name in {crop.source for crop in sample.CROPS}:
        assert f"`{name}`" in text
