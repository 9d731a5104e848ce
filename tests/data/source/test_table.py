"""data=table: parquet, jsonl and csv, with bytes, names and addresses; and what is no such table."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nai_xl.data.index import Index
from nai_xl.data.source import linked, places, sheet, table
from nai_xl.data.source.folder import FolderSource
from nai_xl.data.source.table import TableSource
from nai_xl.errors import UserError
from tests.data.source import forms
from tests.data.source.test_shards import picture


def scanned(path: Path | str, **settings: Any) -> Index:
    return TableSource(files=str(path), **settings).scan()


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def reasons(index: Index) -> list[str]:
    return sorted(skip.reason for skip in index.skipped)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_bytes_of_every_kind_and_lists_of_captions(tmp_path: Path, kind: pa.DataType) -> None:
    made = [picture(n) for n in range(3)]
    captions = pa.array([["one", " uno "], ["two"], ["", " "]], pa.list_(pa.string()))
    index = scanned(parquet(tmp_path / "t.parquet", jpg=pa.array(made, kind), captions=captions))
    found = {item.open().read(): item.captions for item in index.items}
    assert found == {made[0]: ("one", "uno"), made[1]: ("two",), made[2]: ("",)}


def test_columns_are_named_or_found_and_an_error_lists_them(tmp_path: Path) -> None:
    columns = {"image": [picture(1)], "other": [picture(2)], "text": ["a"], "long": ["b"], "score": [1.5]}
    path = parquet(tmp_path / "t.parquet", **columns)
    (found,) = scanned(path).items
    (named,) = scanned(path, image="other", caption="long").items
    assert (found.open().read(), found.caption) == (picture(1), "a")
    assert (named.open().read(), named.caption) == (picture(2), "b")
    there = "there is image, other, text, long, score"
    for settings, message in (
        ({"image": "imgae"}, f"data.image=imgae: no such column in .*t.parquet; {there}"),
        ({"caption": "score"}, "data.caption=score: double in .*t.parquet; captions are texts"),
        ({"image": "score"}, "data.image=score: double in .*t.parquet; images are bytes"),
    ):
        with pytest.raises(UserError, match=message):
            scanned(path, **settings)
    bare = parquet(tmp_path / "bare.parquet", a=[b"x"], b=["y"])
    with pytest.raises(UserError, match=r"no column of images .* set data\.image=COLUMN, of a, b"):
        scanned(bare)


def test_rows_without_an_image_or_a_caption_are_listed(tmp_path: Path) -> None:
    images = [
        None,
        {"bytes": None, "path": None},
        {"bytes": b"x", "path": "x"},
        *({"bytes": picture(n), "path": ""} for n in range(4)),
    ]
    texts = ["a", "b", "c", None, "", "d\0", "e"]
    index = scanned(parquet(tmp_path / "t.parquet", image=pa.array(images, forms.IMAGE), text=texts))
    assert sorted(item.caption for item in index.items) == ["", "e"]
    assert [reason[:20] for reason in reasons(index)] == [
        "no caption in this r", "no image in this row", "no image in this row", "not a readable image",
        "the caption holds NU",
    ]  # fmt: skip
    assert index.remarks == [
        "1 images have a blank caption and are trained with it; data.blank_captions=skip leaves them out"
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_names_are_seen_from_the_tables_folder(images: Path, suffix: str) -> None:
    rows = [{"file_name": path.name, "text": path.with_suffix(".txt").read_text()} for path in images.glob("*.png")]
    rows[0]["file_name"] = str(images / rows[0]["file_name"])  # or are absolute
    rows += [{"file_name": "gone.png", "text": "gone"}]
    path = images / f"t.{suffix}"
    if suffix == "jsonl":
        path.write_text("\ufeff" + "".join(json.dumps(row) + "\n\n" for row in rows))
    elif suffix == "csv":
        path.write_text("\ufefffile_name,text\n" + "".join(f'{row["file_name"]},"{row["text"]}"\n' for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    index = scanned(path)
    folder = FolderSource(images).scan()
    assert index.fingerprint() == folder.fingerprint() and reasons(index) == ["no such file"]
    assert [item.open().read() for item in index.items] == [item.path.read_bytes() for item in folder.items]


def test_a_named_file_that_changes_is_read_again(images: Path) -> None:
    path = images / "t.jsonl"
    path.write_text(json.dumps({"image": "00.png", "text": "a"}) + "\n" + json.dumps({"image": "01.png", "text": "b"}))
    first = scanned(path)
    (images / "00.png").write_bytes(picture(9))
    (images / "01.png").unlink()
    second = scanned(path)
    assert [item.open().read() for item in second.items] == [picture(9)] and len(first.items) == 2


def test_bad_lines_are_listed(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    good = json.dumps({"image": "1.png", "text": "a"})
    lines = [good, "{", "[1]", "\xff", "[" * 100_000, json.dumps({"image": 3, "text": "x"}), json.dumps({"text": "x"}),
             json.dumps({"image": "a\0b", "text": "x"})]  # fmt: skip
    (tmp_path / "t.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    index = scanned(tmp_path / "t.jsonl")
    assert len(index.items) == 1 and len(index.skipped) == 7
    assert sum("is no JSON object" in reason for reason in reasons(index)) == 4
    (tmp_path / "t.csv").write_bytes(b'image,text\n1.png,"a\xe9"\n1.png,' + b"x" * 200_000 + b"\n1.png,b\n1.png\n")
    index = scanned(tmp_path / "t.csv")
    assert [item.caption for item in index.items] == ["b"] and len(index.skipped) == 3
    assert "the caption is not UTF-8; save the table in UTF-8" in reasons(index)


def test_what_windows_writes_is_read_and_names_may_be_of_any_bytes(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(1))
    (tmp_path / "2.png").write_bytes(picture(2))
    (tmp_path / "t.csv").write_bytes(b'image,text\r\ncaf\xe9.png,a\r\n2.png,"two\r\nlines"\r\n')
    (tmp_path / "u.csv").write_bytes('image,text\r\n2.png,"two\r\nlines"\r\n'.encode("utf-16"))
    first, second = scanned(tmp_path / "t.csv"), scanned(tmp_path / "u.csv")
    assert {item.caption for item in first.items} == {"a", "two\nlines"} and not first.skipped
    assert {item.open().read() for item in first.items} == {picture(1), picture(2)}
    assert [item.caption for item in second.items] == ["two\nlines"]


def test_files_that_are_gone_count_as_skipped_images(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "t.csv").write_text("image,text\n1.png,a\n2.png,b\n")
    assert scanned(tmp_path / "t.csv").skipped.in_words() == " (1 skipped: 1 missing file; listed in skipped.csv)"


def test_a_table_without_a_row_is_told(tmp_path: Path) -> None:
    empty = parquet(tmp_path / "t.parquet", image=pa.array([], pa.binary()), text=pa.array([], pa.string()))
    with pytest.raises(UserError, match=r"^data\.files=.*t\.parquet: there is no image$"):
        scanned(empty)


@pytest.mark.parametrize("content", [b"", b"PAR1" + b"x" * 100 + b"PAR1", b"x" * 3])
def test_what_is_no_parquet_file_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.files=.*t\.parquet: ") as told:
        scanned(tmp_path)
    assert "\n" not in str(told.value)


def test_tables_that_differ_in_columns_are_told(tmp_path: Path) -> None:
    parquet(tmp_path / "1.parquet", image=[picture(1)], text=["a"])
    parquet(tmp_path / "2.parquet", picture=[picture(1)], text=["a"])
    with pytest.raises(UserError, match=r"2\.parquet has no column image, as other files have; there is picture, text"):
        scanned(tmp_path)


# --- random access ----------------------------------------------------------------------------------------------------


def test_a_row_group_is_read_once_for_all_its_images_and_few_are_kept(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = scanned(forms.as_table(images, tmp_path / "t.parquet"))  # groups of 5, 5 and 2
    opened: list[str] = []
    parquet = sheet.parquet
    monkeypatch.setattr(table, "_recent", table._Recent())
    monkeypatch.setattr(sheet, "parquet", lambda where: opened.append(where) or parquet(where))
    for _ in range(2):
        for item in index.items:
            item.open()
    assert len(opened) == 3
    monkeypatch.setattr(table, "KEPT", 1)
    in_groups = sorted(index.items, key=lambda item: item.row["group"])  # type: ignore[index]
    for item in in_groups:
        item.open()
    assert len(opened) == 6 or len(opened) == 5  # the last one was still there
    assert len(table._recent.groups) == 1


def test_images_are_read_along_the_files_that_they_lie_in(images: Path, tmp_path: Path) -> None:
    tables = [forms.as_table(images, tmp_path / f"{n}.parquet") for n in "ab"]
    rows = scanned(str(tmp_path / "*.parquet")).items
    along = [rows[n].row for n in np.argsort(rows.lies)]
    assert len(along) == 12 * len(tables)
    places = [(row["shard"], row["group"], row["place"]) for row in along]  # type: ignore[index]
    assert places == sorted(places) and places[-1] == (1, 2, 1)


def test_what_large_row_groups_cost_is_said(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "COSTLY", 100)
    (said,) = scanned(forms.as_table(images, tmp_path / "t.parquet")).remarks
    assert "row_group_size=100" in said


def test_a_table_that_changed_meanwhile_is_an_error_of_reading(images: Path, tmp_path: Path) -> None:
    path = forms.as_table(images, tmp_path / "t.parquet")
    index = scanned(path)
    parquet(path, image=[b"x"], text=["a"])
    last = max(index.items, key=lambda item: item.row["place"])  # type: ignore[index]
    with pytest.raises(OSError, match=r"t\.parquet"):
        last.open()


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/tables", recursive=True)


def test_a_table_in_a_store(images: Path, tmp_path: Path, store: Any) -> None:
    store.pipe("/tables/t.parquet", forms.as_table(images, tmp_path / "t.parquet").read_bytes())
    store.pipe("/tables/more/1.png", picture(1))
    store.pipe(
        "/tables/t.jsonl",
        b'{"image": "more/1.png", "text": "near"}\n{"image": "memory://tables/more/1.png", "text": "far"}',
    )
    assert scanned("memory://tables/t.parquet").fingerprint() == FolderSource(images).scan().fingerprint()
    index = scanned("memory://tables/t.jsonl")
    assert {item.caption: item.open().read() for item in index.items} == {"near": picture(1), "far": picture(1)}


def test_a_table_does_not_choose_how_it_is_read(tmp_path: Path, store: Any) -> None:
    store.pipe("/tables/x", b"")
    rows = [
        {"image": at, "text": "x"} for at in ("memory://tables/x", "github://a:b@/c", "simplecache::memory://tables/x")
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="of kind memory; a table may name https"):
        scanned(tmp_path / "t.jsonl")


def test_an_address_is_tried_again_before_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([OSError("busy"), OSError("busy"), picture(1), *[OSError("down: https://me:pw@h/x")] * linked.TRIES])

    def read(where: str) -> bytes:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(places, "read", read)
    monkeypatch.setattr(places, "AT_ONCE", 1)
    rows = [{"image": f"https://host/{n}.png?sig=abc", "text": "x"} for n in range(2)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index = scanned(tmp_path / "t.jsonl")
    assert [str(item.path) for item in index.items] == ["host/0.png"]
    assert reasons(index) == ["cannot be read: down: https://***@h/x"]
