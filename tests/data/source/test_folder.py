"""What becomes of each file in a folder, as docs/data.md says; and what no folder can do to a scan."""

import csv
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from nai_xl.data.images import HEIF, open_rgb, picture
from nai_xl.data.source import caption_files
from nai_xl.data.source.folder import scan
from nai_xl.errors import UserError

DOCS = Path(__file__).parents[3] / "docs" / "data.md"
COLOUR = (200, 30, 60)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def plain(size: tuple[int, int] = (30, 20), colour: tuple[int, int, int] = COLOUR) -> Image.Image:
    return Image.new("RGB", size, colour)


def swapped() -> bytes:
    """sRGB with the tags of red and green exchanged."""
    data = bytearray(SRGB)
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


def png(**save: Any) -> bytes:
    file = io.BytesIO()
    plain().save(file, "PNG", **save)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """The header of a PNG that would be this large, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def save(image: Image.Image, **how: Any) -> Callable[[Path], object]:
    return lambda path: image.save(path, **how)


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def turned() -> Callable[[Path], object]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(plain(), exif=exif)


def text_chunk() -> Callable[[Path], object]:
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a word " * 300_000, zip=True)
    return save(plain(), pnginfo=text)


ANIMATED = save(plain(), save_all=True, append_images=[plain(colour=(0, 0, 250))])
MAKERS: dict[str, Callable[[Path], object]] = {
    **{f"photo.{suffix}": save(plain()) for suffix in "jpg jpeg png webp avif bmp tif jp2 ppm tga".split()},
    "photo.jfif": save(plain(), format="JPEG"),
    "photo.heic": content(b"\0\0\0\x18ftypheic" + bytes(100)),
    "animated.gif": ANIMATED,
    "animated.webp": ANIMATED,
    "UPPER.PNG": content(png()),
    "cmyk.jpg": save(plain().convert("CMYK"), quality=95),
    "sixteen.png": save(Image.fromarray(np.full((20, 30), 128 * 257, np.uint16))),
    "camera.jpg": lambda path: plain().save(path, "MPO", save_all=True, append_images=[plain(colour=(0, 0, 250))]),
    "really_a_png.jpg": content(png(compress_level=0)),
    "turned.jpg": turned(),
    "swapped.png": content(png(icc_profile=swapped())),
    "damaged_profile.png": content(png(icc_profile=b"no profile")),
    "two_megabytes_of_text.png": text_chunk(),
    "linked.png": lambda path: path.symlink_to("photo.png"),
    "small.png": save(plain((30, 12))),
    "bomb.png": content(bomb(12000, 9000)),
    "empty.png": content(b""),
    "text.png": content(b"a text"),
    "pipe.png": os.mkfifo,
    "dangling.png": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.parent),
    "orphan.txt": content(b"alone"),
    "photo.caption": content(b"another"),
    "drawing.psd": content(b"8BPS"),
    "movie.mp4": content(b"movie"),
    "README": content(b"read me"),
    ".DS_Store": content(b"Bud1"),
    "._photo.png": content(b"attributes"),
    "shard.tar": content(b"tar"),
    "table.parquet": content(b"PAR1"),
}
CAPTIONS: dict[str, bytes | None] = {
    "windows": b"\xef\xbb\xbfa caption\r\n",
    "utf16": "a caption".encode("utf-16"),
    "blank": b" \n",
    "cp1252": "ein schönes Bild".encode("cp1252"),
    "nul": b"a \0 caption",
    "utf16_unmarked": "a caption".encode("utf-16-le"),
    "long": b"x" * 70000,
    "no_caption": None,
    "CAPITALS": None,
    "._photo": None,
    "other": None,
    "object": None,
    "no_text": None,
}
TABLE = ("row.png", "not_in_table.png")


def rows() -> Iterator[tuple[str, str]]:
    """File and outcome, as the page has them."""
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| `([^`]+)`[^|]*\| (.*) \|", line):
            yield match[1], match[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the page."""
    folder = tmp_path_factory.mktemp("everything")
    (folder / "table").mkdir()
    for name, _ in rows():
        path = folder / ("table" if name in TABLE else "") / name
        MAKERS.get(name, save(plain()))(path)
        caption = CAPTIONS.get(path.stem, f"the caption of {name}".encode())
        if caption is not None and path.suffix not in (".txt", ".caption", "") and name not in TABLE:
            path.with_suffix(".txt").write_bytes(caption)
    for name in ("drawing", "movie", "shard", "table"):
        (folder / f"{name}.txt").unlink()
    (folder / "CAPITALS.TXT").write_text("a caption")
    (folder / "other.caption").write_text("a caption")
    (folder / "object.json").write_text(json.dumps({"id": 5, "captions": ["one", "two"]}))
    (folder / "no_text.json").write_text(json.dumps({"id": 5}))
    (folder / "table" / "metadata.jsonl").write_text(json.dumps({"file_name": "row.png", "text": "of a row"}))
    return folder


def test_every_file_becomes_what_the_page_says(folder: Path) -> None:
    index = scan(folder)
    used = {item.path.name for item in index.items}
    skipped = {row.path.name: row.reason for row in index.skipped}
    for name, outcome in rows():
        if name == "photo.heic" and HEIF:
            continue
        kind, _, reason = outcome.partition(": ")
        assert (name in used) == (kind == "used"), name
        assert (name in skipped) == (kind == "skipped"), name
        if kind == "skipped" and name not in ("empty.png", "text.png"):
            assert skipped[name] == reason
    assert skipped["empty.png"].startswith("not a readable image: ")
    everything = {path.name for path in folder.rglob("*")}
    sidecars = {
        path.name for path in folder.rglob("*") if path.suffix.lower() in (".txt", ".caption", ".json", ".jsonl")
    }
    assert everything - used - set(skipped) - sidecars == {"table"}


def test_the_start_says_what_was_not_used_with_counts_and_overrides(folder: Path) -> None:
    said = "\n".join(scan(folder).remarks)
    for words in (
        "not images: 1 without a suffix, 1 .mp4, 1 .psd",
        "1 .tar in data.dir not read; data=shards",
        "1 .parquet in data.dir not read; data=table",
        "have the caption file of another, and its caption: ",
        "1 images have a blank caption and are trained with it; data.blank_captions=skip leaves them out",
        "1 images have a colour profile of their own and are converted to sRGB",
        "1 images have a damaged colour profile, which is ignored",
    ):
        assert words in said
    assert len(scan(folder, blank_captions="skip").items) == len(scan(folder).items) - 1


def test_captions_are_read_from_wherever_they_are(folder: Path) -> None:
    found = {item.path.name: item.captions for item in scan(folder).items}
    assert found["windows.png"] == found["utf16.png"] == found["other.png"] == found["CAPITALS.JPG"] == ("a caption",)
    assert found["object.png"] == ("one", "two") and found["row.png"] == ("of a row",) and found["blank.png"] == ("",)
    cp1252 = {item.path.name: item.captions for item in scan(folder, encoding="cp1252").items}
    assert cp1252["cp1252.png"] == ("ein schönes Bild",) and cp1252["utf16.png"] == ("a caption",)
    assert "utf16_unmarked.png" in {item.path.name for item in scan(folder, encoding="utf-16-le").items}


def test_pictures_are_seen_as_they_are_meant(folder: Path) -> None:
    items = {item.path.name: item for item in scan(folder).items}
    for name, item in items.items():
        red, green, blue = np.asarray(picture(item), int).mean((0, 1))
        expected = {"swapped.png": (COLOUR[1], COLOUR[0], COLOUR[2]), "sixteen.png": (128, 128, 128)}.get(name, COLOUR)
        assert np.abs(np.array([red, green, blue]) - expected).max() < 6, name
    assert items["turned.jpg"].size == picture(items["turned.jpg"]).size == (20, 30)


def test_a_profile_changes_pixels_only_where_its_colours_differ(tmp_path: Path) -> None:
    random = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    for name, profile in {"none": None, "srgb": SRGB, "swapped": swapped()}.items():
        Image.fromarray(random).save(tmp_path / f"{name}.png", icc_profile=profile)
    same = {
        name: (np.asarray(open_rgb(tmp_path / f"{name}.png")) == random).all() for name in ("none", "srgb", "swapped")
    }
    assert same == {"none": True, "srgb": True, "swapped": False}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_name_images_below_them_and_may_give_several_captions(tmp_path: Path, kind: str) -> None:
    table = [
        {"file_name": "a.png", "text": "one, with a comma"},
        {"file_name": "./sub/b.png", "text": "zwei\nZeilen"},
        {"file_name": "gone.png", "text": "nothing"},
        {"file_name": "sub/own.png", "text": "not this"},
    ]
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png", "sub/own.png"):
        plain().save(tmp_path / name)
    (tmp_path / "sub" / "own.txt").write_text("its own")
    path = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, table)))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(table)
    else:
        pq.write_table(pa.Table.from_pylist(table), path)
    for _ in range(2):
        found = {item.path.name: item.captions for item in scan(tmp_path).items}
        assert found == {"a.png": ("one, with a comma",), "b.png": ("zwei\nZeilen",), "own.png": ("its own",)}
    said = "1 images have a caption file of their own, which comes before metadata.jsonl, .csv or .parquet: sub/own.png"
    assert said in scan(tmp_path).remarks
    path.write_text('{"file_name": 5') if kind == "jsonl" else path.write_bytes(b"\xff\xfe\0")
    assert [item.path.name for item in scan(tmp_path).items] == ["own.png"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_is_wrong_with_a_table_is_found_once_and_told_with_its_mend(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.png" for number in range(5)]
    for number, name in enumerate(names):
        plain((20 + number, 20)).save(tmp_path / name)
    path = tmp_path / f"metadata.{kind}"
    header = [] if kind == "jsonl" else ["file_name,text"]
    lines = [
        f"{name},schön" if header else json.dumps({"file_name": name, "text": "schön"}, ensure_ascii=False)
        for name in names
    ]
    path.write_text("\r\n".join([*header, *lines]), encoding="cp1252", newline="")
    opened: list[Path] = []
    read = caption_files.READERS[path.suffix]
    monkeypatch.setitem(caption_files.READERS, path.suffix, lambda *where: opened.append(where[0]) or read(*where))
    with pytest.raises(UserError, match=rf"metadata\.{kind} is not UTF-8; data\.encoding=cp1252 reads"):
        scan(tmp_path)
    assert opened == [path]
    assert {item.caption for item in scan(tmp_path, encoding="cp1252").items} == {"schön"}


def test_lines_of_a_table_that_name_no_file_are_told_by_number(tmp_path: Path) -> None:
    plain().save(tmp_path / "a.png")
    for line in ("{", "[1]", json.dumps({"text": "x"})):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}) + f"\n{line}\n")
        with pytest.raises(
            UserError, match=r"metadata\.jsonl cannot be read: line 2 is no JSON object with a file_name"
        ):
            scan(tmp_path)


def test_hidden_files_are_listed_and_never_counted(tmp_path: Path) -> None:
    plain().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    for name in (".nai_xl_sample", ".DS_Store", "Thumbs.db", "desktop.ini", "._a.png", "._a.txt"):
        (tmp_path / name).write_bytes(b"of a program")
    index = scan(tmp_path)
    assert len(index.items) == 1 and index.remarks == [] and index.skipped.in_words() == ""
    assert {row.reason for row in index.skipped} == {"a hidden file"} and len(index.skipped) == 6


def test_each_line_may_be_a_caption(tmp_path: Path) -> None:
    plain().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one\n\n two \r\nthree\n")
    assert scan(tmp_path, caption_lines=True).items[0].captions == ("one", "two", "three")
    assert scan(tmp_path).items[0].caption == "one\n\n two \nthree"


@pytest.mark.parametrize("late", [True, False])
def test_exif_behind_the_pixels_of_a_png_counts_too(tmp_path: Path, late: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(exif=exif)
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    if late:
        data = data[:start] + data[stop:-12] + data[start:stop] + data[-12:]
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "a.txt").write_text("a caption")
    assert scan(tmp_path).items[0].size == open_rgb(tmp_path / "a.png").size == (20, 30)


ODD = ["a,b.png", "a\nb.png", "[red]b.png", 'a"b.png', "b\r.png", os.fsdecode(b"\xff\xe9.png"), "猫.png"]


def test_names_of_any_bytes_are_used_and_listed_and_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for number, name in enumerate(ODD):
        for path, caption in ((folder / name, True), (folder / "bare" / name, False)):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                plain((20 + number, 20)).save(path, format="PNG")
            except OSError:
                pytest.skip("this file system allows Unicode names only")
            if caption:
                path.with_suffix(".txt").write_text("a caption")
    index = scan(folder)
    assert {item.path.name for item in index.items} == set(ODD)
    assert [picture(item).size for item in index.items] == [item.size for item in index.items]
    index.skipped.write(tmp_path / "skipped.csv")
    with (tmp_path / "skipped.csv").open(newline="", encoding="utf-8") as file:
        found = [Path(row["file"]).name for row in csv.DictReader(file)]
    assert set(found) == {name.encode(errors="backslashreplace").decode() for name in ODD}
    with pytest.raises(UserError, match=r"none of 7 images .*") as error:
        scan(folder / "bare")
    assert "\n" not in str(error.value)


def test_linked_folders_are_followed_once_and_keep_their_own_names(tmp_path: Path) -> None:
    folder, outside = tmp_path / "images", tmp_path / "outside"
    for number, path in enumerate((folder / "z" / "own.png", outside / "far.png")):
        path.parent.mkdir(parents=True)
        plain((20 + number, 20)).save(path)
        path.with_suffix(".txt").write_text("a caption")
    (folder / "a").symlink_to(folder / "z")
    (folder / "b").symlink_to(outside)
    (outside / "back").symlink_to(folder)
    (folder / "self.png").symlink_to("self.png")
    index = scan(folder)
    assert {item.path.relative_to(folder).as_posix() for item in index.items} == {"z/own.png", "b/far.png"}
    again = "a link to a folder that is searched already"
    assert {row.path.relative_to(folder).as_posix(): row.reason for row in index.skipped} == {
        "a": again,
        "b/back": again,
        "self.png": "a link that leads to itself",
    }


@pytest.mark.parametrize("name", ["set-000.tar", "train.parquet"])
def test_a_folder_of_archives_names_the_option_that_reads_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    option = {"tar": "shards", "parquet": "table"}[name.rpartition(".")[2]]
    with pytest.raises(UserError, match=f"no images in this folder, but 1 .* which data={option} reads"):
        scan(tmp_path)


def test_one_image_of_one_pixel_is_enough(tmp_path: Path) -> None:
    plain((1, 1)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dot")
    assert scan(tmp_path, min_side=1).items[0].size == (1, 1)
