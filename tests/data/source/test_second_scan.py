"""A second scan of a folder: the same index as a fresh one, without opening what has not changed."""

import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nai_xl.data.index import Index
from nai_xl.data.source import folder as module
from nai_xl.data.source import reading
from nai_xl.data.source.folder import scan
from nai_xl.files import user_cache

Touched = list[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six images, in two folders, one without a caption and one too small."""
    monkeypatch.setenv("NAI_XL_CACHE", str(tmp_path / "cache"))
    for number in range(6):
        put(tmp_path / "images" / str(number % 2) / f"{number}.png", number)
    (tmp_path / "images" / "0" / "4.txt").unlink()
    put(tmp_path / "images" / "1" / "dot.png", 9, side=4)
    return tmp_path / "images"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands an hour ahead, so that the files just made count as old."""
    now = module.time.time() + 3600
    monkeypatch.setattr(module.time, "time", lambda: now)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Touched:
    """The names of files that are read from now on."""
    names: Touched = []

    def counted(file: bytes, mode: str) -> Any:
        names.append(Path(os.fsdecode(file)).name)
        return open(file, mode)  # noqa: PTH123

    monkeypatch.setattr(reading, "open", counted, raising=False)
    return names


def put(path: Path, seed: int, *, side: int = 24, caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + seed, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)
    path.with_suffix(".txt").write_text(caption or f"number {seed} 猫")


def look(folder: Path, **settings: Any) -> Index:
    return scan(folder, **settings)


def fresh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The index by a scan that remembers nothing."""
    with monkeypatch.context() as patch:
        patch.setenv("NAI_XL_CACHE", str(folder.parent / secrets.token_hex(4)))
        return look(folder)


def table() -> Path:
    """The newest index file."""
    return max((user_cache() / "index").glob("*/*.arrow"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.usefixtures("later")
def test_second_scan_opens_nothing_and_gives_the_same_index(folder: Path, opened: Touched) -> None:
    first = look(folder)
    usable = ("0", "1", "2", "3", "5", "dot")
    assert sorted(opened) == sorted(f"{name}.{suffix}" for name in usable for suffix in ("png", "txt"))
    opened.clear()
    assert look(folder) == first
    assert [skip.path.name for skip in first.skipped] == ["4.png", "dot.png"]
    assert opened == []


@pytest.mark.usefixtures("later")
def test_the_smallest_side_may_change_between_scans(folder: Path, opened: Touched) -> None:
    assert len(look(folder).items) == 5
    opened.clear()
    assert len(look(folder, min_side=4).items) == 6
    assert opened == []


@pytest.mark.usefixtures("later")
def test_a_relative_path_and_a_link_lead_to_the_same_table(
    folder: Path, opened: Touched, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = look(folder).items
    opened.clear()
    monkeypatch.chdir(folder)
    Path("../link").symlink_to(folder)
    for other in (Path(), Path("../images"), Path("../link")):
        assert [item.content for item in look(other).items] == [item.content for item in items]
    assert opened == []
    assert {item.path.parts[0] for item in look(Path()).items} == {"0", "1"}


def change_picture(folder: Path) -> None:
    put(folder / "0" / "0.png", 7, caption="number 0 猫")


def change_bytes_and_hide_it(folder: Path) -> None:
    """The same length and the same modification time: what unpacking another archive can do."""
    path = folder / "0" / "0.png"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def change_time(folder: Path) -> None:
    os.utime(folder / "0" / "0.png", (1, 1))


def change_caption(folder: Path) -> None:
    (folder / "0" / "0.txt").write_text("another")


def swap_pictures(folder: Path) -> None:
    first, second, aside = folder / "0" / "0.png", folder / "0" / "2.png", folder / "aside"
    for path in (first, second):
        os.utime(path, (5, 5))
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def add_and_remove(folder: Path) -> None:
    put(folder / "2" / "0.png", 8)
    (folder / "0" / "2.png").unlink()
    (folder / "1" / "1.txt").unlink()
    (folder / "0" / "4.txt").write_text("found again")


def break_picture(folder: Path) -> None:
    (folder / "0" / "0.png").write_bytes(b"no image")


CHANGES = [change_picture, change_bytes_and_hide_it, change_time, change_caption, swap_pictures, add_and_remove]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("change", [*CHANGES, break_picture])
def test_after_any_change_the_index_equals_a_fresh_one(
    folder: Path, change: Callable[[Path], None], opened: Touched, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(folder)
    change(folder)
    expected = fresh(folder, monkeypatch)
    opened.clear()
    found = look(folder)
    assert found == expected
    assert opened and "5.png" not in opened
    assert look(folder) == expected


@pytest.mark.parametrize("age", ["just now", "in the future"])
def test_files_that_changed_just_now_are_read_again(
    folder: Path, opened: Touched, monkeypatch: pytest.MonkeyPatch, age: str
) -> None:
    newest = max(path.stat().st_ctime for path in folder.rglob("*"))
    now = newest + 1.9 if age == "just now" else newest - 100
    monkeypatch.setattr(module.time, "time", lambda: now)
    first = look(folder)
    opened.clear()
    assert look(folder) == first
    assert "0.png" in opened and "0.txt" in opened
    monkeypatch.setattr(module.time, "time", lambda: newest + 2.1)
    look(folder)
    opened.clear()
    assert look(folder) == first
    assert opened == []


def replaced(path: Path, data: bytes) -> None:
    """Another file of this name: the one that is mapped stays."""
    path.unlink()
    path.write_bytes(data)


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("damage", ["empty", "half", "hash", "zeros", "garbage", "folder"])
def test_a_damaged_table_is_ignored_and_made_anew(folder: Path, opened: Touched, damage: str) -> None:
    first = look(folder)
    path = table()
    data = path.read_bytes()
    broken = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "hash": flipped(data, data.index(bytes.fromhex(first.items[0].content))),
        "zeros": data[:512] + bytes(512) + data[1024:],
        "garbage": b"\xff" * 100,
    }
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        replaced(path, broken[damage])
    opened.clear()
    assert look(folder) == first
    assert "0.png" in opened
    if damage != "folder":
        assert path.read_bytes() == data


@pytest.mark.usefixtures("later")
def test_a_table_that_cannot_be_written_harms_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = look(folder)
    (folder.parent / "file").write_text("in the way")
    monkeypatch.setenv("NAI_XL_CACHE", str(folder.parent / "file"))
    assert look(folder) == expected


@pytest.mark.usefixtures("later")
def test_scans_at_once_agree_and_leave_a_whole_table(folder: Path, opened: Touched) -> None:
    found: list[Index] = []
    threads = [threading.Thread(target=lambda: found.append(look(folder))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.clear()
    assert found == [look(folder)] * 6
    assert opened == []
    assert not [*(table().parent / "parts").iterdir()]


@pytest.mark.usefixtures("later")
def test_an_unchanged_folder_leaves_the_table_alone_and_files_that_went_are_forgotten(folder: Path) -> None:
    look(folder)
    before = table().stat()
    look(folder)
    assert table().stat().st_ino == before.st_ino
    (folder / "1" / "5.png").unlink()
    look(folder)
    assert b"5.png" not in table().read_bytes()


@pytest.mark.usefixtures("later")
def test_names_that_are_not_unicode_are_remembered_too(folder: Path, opened: Touched) -> None:
    odd = os.fsdecode(b"\xff\xe9")
    try:
        put(folder / f"{odd}.png", 3)
    except OSError:
        pytest.skip("this file system allows Unicode names only")
    first = look(folder)
    opened.clear()
    assert look(folder) == first
    assert opened == []
