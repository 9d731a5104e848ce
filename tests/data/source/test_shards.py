"""data=shards: how members become images with captions, and what is used or listed of odd and hostile ones."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from nai_xl.data.index import Index
from nai_xl.data.source import places, shards
from nai_xl.data.source.shards import ShardsSource
from nai_xl.errors import UserError


def picture(colour: int = 0, size: tuple[int, int] = (20, 20), kind: str = "PNG") -> bytes:
    made = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(made, kind)
    return made.getvalue()


def packed(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def scanned(path: Path, **settings: object) -> Index:
    return ShardsSource(files=str(path), **settings).scan()  # type: ignore[arg-type]


def used(index: Index, shard: Path) -> dict[str, tuple[str, ...]]:
    """Member -> captions."""
    return {str(item.path).removeprefix(f"{shard}/"): item.captions for item in index.items}


def listed(index: Index, shard: Path) -> dict[str, str]:
    return {str(skip.path).removeprefix(f"{shard}").lstrip("/"): skip.reason for skip in index.skipped}


def test_an_image_has_the_caption_of_its_name_up_to_the_first_dot(tmp_path: Path) -> None:
    shard = packed(
        tmp_path / "s.tar",
        {
            "a/1.JPG": picture(1, kind="JPEG"), "a/1.txt": b"\xef\xbb\xbf one\r\n", "a/1.cls": b"7",
            "b/1.png": picture(2), "b/1.caption": b"another one",
            "2.v2.webp": picture(3, kind="WEBP"), "2.txt": b"two",
            "3.png": picture(4), "3.json": json.dumps({"caption": ["three", "drei"]}).encode(),
            "4.png": picture(5), "4.json": b'{"text": "not this"}', "4.txt": b"four",
            "5.jpg": picture(6), "5.mask.png": picture(7), "5.txt": b"five",
        },
    )  # fmt: skip
    index = scanned(shard)
    assert used(index, shard) == {
        "a/1.JPG": ("one",), "b/1.png": ("another one",), "2.v2.webp": ("two",), "3.png": ("three", "drei"),
        "4.png": ("four",), "5.jpg": ("five",),
    }  # fmt: skip
    assert listed(index, shard) == {
        "5.mask.png": "no caption 5.mask.txt in the shard",
        "": "1 member .cls: neither image nor caption",
    }


def test_each_line_is_a_caption_where_that_is_asked(tmp_path: Path) -> None:
    shard = packed(tmp_path / "s.tar", {"1.png": picture(), "1.txt": b"one\n\nuno\n"})
    assert scanned(shard, caption_lines=True).items[0].captions == ("one", "uno")
    assert scanned(shard).items[0].captions == ("one\n\nuno",)


def odd_members(tar: tarfile.TarFile) -> None:
    for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE)):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    for name, content in (
        ("../../up.png", picture(1)), ("../../up.txt", b"up"), ("/etc/abs.png", picture(2)), ("/etc/abs.txt", b"abs"),
        ("n" * 300 + ".png", picture(3)), ("n" * 300 + ".txt", b"long"), ("\udcff\udcfe.png", picture(4)),
        ("\udcff\udcfe.txt", b"bytes"), ("new\nline, [x].png", picture(5)), ("new\nline, [x].txt", b"line"),
        ("./dot//slash.png", picture(6)), ("./dot//slash.txt", b"dot"), ("empty.png", b""), ("empty.txt", b""),
        ("text.png", b"no picture"), ("text.txt", b"x"), ("._a.png", b"\0\5"), ("tiny.png", picture(7, (3, 3))),
        ("tiny.txt", b"x"), ("nul.png", picture(8)), ("nul.txt", b"a\0b"), ("cp.png", picture(9)), ("cp.txt", b"\xe9"),
        ("half.png", picture(10)), ("half.json", b'"\\ud800"'), ("deep.png", picture(11)),
        ("deep.json", b"[" * 50_000), ("long.png", picture(12)), ("long.txt", b"x" * 70_000), ("bare", b"x"),
        ("alone.txt", b"nobody's"), ("none.png", picture(13)), ("__meta__/1.png", picture(14)),
        ("twice.png", picture(15)), ("twice.txt", b"first"), ("twice.png", picture(16)),
    ):  # fmt: skip
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_members_are_used_or_listed_and_nothing_is_written(tmp_path: Path, kind: int) -> None:
    shard = tmp_path / "in" / "s.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w", format=kind) as tar:
        odd_members(tar)
    before = sorted(tmp_path.rglob("*"))
    index = scanned(shard)
    assert {item.caption for item in index.items} == {"up", "abs", "long", "bytes", "line", "dot", "first", "?"}
    assert {str(item.path).startswith(f"{shard}/") for item in index.items} == {True}
    assert next(item for item in index.items if item.caption == "first").open().read() == picture(15)
    reasons = listed(index, shard)
    for name, part in {
        "l.png": "a link", "h.png": "a link", "d.png": "a device", "empty.png": "not a readable image",
        "text.png": "not a readable image", "tiny.png": "3x3 pixels; data.min_side is 16", "nul.png": "NUL",
        "cp.png": "not UTF-8", "deep.png": "JSON", "long.png": "data.max_caption is 65536",
        "alone.txt": "no image", "none.png": "no caption none.txt", "twice.png": "second member",
    }.items():  # fmt: skip
        assert part in reasons[name], name
    assert index.without({index.items[0].path: "gone"}).items == index.items[1:]
    index.skipped.write(tmp_path / "skipped.csv")
    (tmp_path / "skipped.csv").unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("cut", [100, 512, 600, 3 * 512 + 10])
def test_a_shard_that_was_cut_gives_what_came_before(tmp_path: Path, cut: int) -> None:
    shard = packed(tmp_path / "s.tar", {"1.png": picture(1), "1.txt": b"one", "2.txt": b"two", "2.png": picture(2)})
    whole = shard.read_bytes().rstrip(b"\0")
    shard.write_bytes(whole[: len(whole) - cut])
    index = scanned(shard)
    assert used(index, shard) == {"1.png": ("one",)}
    assert any(word in " ".join(listed(index, shard).values()) for word in ("cut off", "damaged"))


def test_what_is_no_tar_file_at_all_is_told_in_one_line(tmp_path: Path) -> None:
    packed(tmp_path / "s.tar", {"1.png": picture()})
    (tmp_path / "s.tar").write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match=r"^data\.files=.*s\.tar: none of 1 images .* no header at byte 0"):
        ShardsSource(str(tmp_path / "s.tar")).scan()
    (tmp_path / "s.tar").write_bytes(gzip.compress(os.urandom(5000)))
    with pytest.raises(UserError, match=r"s\.tar: .* it is compressed, .*; unpack it to a \.tar"):
        scanned(tmp_path / "s.tar")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are read, as they are."""
    found: list[str] = []
    read = shards.read_shard

    def counted(number: int, where: str, texts: shards.Texts) -> object:
        found.append(where.rpartition("/")[2])
        return read(number, where, texts)

    monkeypatch.setattr(shards, "read_shard", counted)
    return found


def test_only_new_and_changed_shards_are_read_again(tmp_path: Path, reads: list[str]) -> None:
    for number in range(3):
        packed(tmp_path / f"{number}.tar", {"1.png": picture(number), "1.txt": b"one"})
    first = scanned(tmp_path)
    assert scanned(tmp_path).items == first.items and sorted(reads) == ["0.tar", "1.tar", "2.tar"]
    reads.clear()
    packed(tmp_path / "1.tar", {"1.png": picture(9), "1.txt": b"one", "2.png": picture(8), "2.txt": b"two"})
    packed(tmp_path / "00.tar", {"1.png": picture(7), "1.txt": b"new"})  # numbers of shards move
    (tmp_path / "2.tar").unlink()
    second = scanned(tmp_path)
    assert sorted(reads) == ["00.tar", "1.tar"]
    colours = {item.caption: set() for item in second.items}  # type: ignore[var-annotated]
    for item in second.items:
        with Image.open(item.open()) as image:
            colours[item.caption].add(image.getpixel((0, 0))[0])  # type: ignore[index]
    assert colours == {"one": {0, 9}, "two": {8}, "new": {7}}


def test_limits_change_what_is_used_and_not_what_is_read(tmp_path: Path, reads: list[str]) -> None:
    packed(tmp_path / "s.tar", {"1.png": picture(1), "1.txt": b"", "2.png": picture(2, (40, 40)), "2.txt": b"two"})
    assert len(scanned(tmp_path).items) == 2
    assert [item.caption for item in scanned(tmp_path, min_side=30).items] == ["two"]
    assert [item.caption for item in scanned(tmp_path, blank_captions="skip").items] == ["two"]
    assert len(scanned(tmp_path, max_megapixels=0.001).items) == 1 and reads == ["s.tar"]


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket() -> Iterator[Callable[[str, bytes], None]]:
    """A store that is not on this machine, as far as fsspec is concerned."""
    system = fsspec.filesystem("memory")
    yield lambda name, content: system.pipe(f"/bucket/{name}", content)
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("named", ["{00..01}.tar", "*.tar", ""])
def test_shards_in_a_store_are_read_by_ranges(
    tmp_path: Path, bucket: Callable[[str, bytes], None], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        content = {f"{number}.png": picture(number), f"{number}.txt": f"{number}".encode()}
        bucket(f"0{number}.tar", packed(tmp_path / "s.tar", content).read_bytes())
    bucket("readme.md", b"hello")
    index = ShardsSource(files=f"memory://bucket/{named}").scan()
    assert {str(item.path).lstrip("/"): item.caption for item in index.items} == {
        "bucket/00.tar/0.png": "0",
        "bucket/01.tar/1.png": "1",
    }
    monkeypatch.setattr(places, "opened", None)  # a second start looks at the stamps alone
    assert ShardsSource(files=f"memory://bucket/{named}").scan().items == index.items
    assert {item.open().read() for item in index.items} == {picture(0), picture(1)}


def test_a_shard_that_has_become_shorter_is_told(tmp_path: Path, bucket: Callable[[str, bytes], None]) -> None:
    tar = packed(tmp_path / "s.tar", {"1.png": picture(), "1.txt": b"one"}).read_bytes()
    bucket("s.tar", tar)
    index = ShardsSource(files="memory://bucket/s.tar").scan()
    bucket("s.tar", tar[:520])
    with pytest.raises(OSError, match=r"bucket/s\.tar has 8 of the"):
        index.items[0].open()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("nowhere/{0..1}.tar", "data.files=nowhere/0.tar: no such file"),
        ("{0..99999999}.tar", "names more than 1000000 files"),
        ("s3://bucket/a.tar", "data.files=s3://bucket/a.tar: Install s3fs"),
        ("gs://bucket/a.tar", "data.files=gs://bucket/a.tar: Please install gcsfs"),
        ("odd://me:secret@bucket/a.tar", r"data.files=odd://\*\*\*@bucket/a.tar: Protocol not known: odd"),
        ("memory://bucket/none.tar", "data.files=memory://bucket/none.tar: "),
        ("memory://bucket/none*", "no such file"),
        ([], "data.files names no file"),
    ],
)
def test_what_cannot_be_reached_is_told_in_one_line(
    files: str | list[str], message: str, bucket: Callable[[str, bytes], None], tmp_path: Path
) -> None:
    bucket("x.txt", b"")
    with pytest.raises(UserError, match=message) as told:
        ShardsSource(files=files).scan()
    assert "secret" not in str(told.value) and "\n" not in str(told.value)


def test_a_folder_without_shards_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nor a folder with any of \.tar"):
        scanned(tmp_path)
    shard = packed(tmp_path / "s.tar", {"1.png": picture(), "1.txt": b"one"})
    if os.geteuid() != 0:  # who reads everything
        shard.chmod(0)
        with pytest.raises(UserError, match=r"data\.files=.*Permission denied"):
            scanned(shard)
