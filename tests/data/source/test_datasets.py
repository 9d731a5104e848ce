"""data=datasets: folders in the layout of Dataset.save_to_disk and DatasetDict.save_to_disk, written by hand."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from nai_xl.data.source.datasets import DatasetsSource
from nai_xl.data.source.folder import FolderSource
from nai_xl.errors import UserError
from tests.data.source import forms
from tests.data.source.test_shards import picture


def message(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as told:
        DatasetsSource(dir=str(folder), **settings).scan()
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_split_is_one_of_those_there_are(images: Path, tmp_path: Path) -> None:
    folder = forms.as_splits(images, tmp_path / "saved")
    found = DatasetsSource(dir=str(folder), split="train").scan()
    assert found.fingerprint() == FolderSource(images).scan().fingerprint()
    assert "several splits; set data.split to one of train, test" in message(folder)
    assert "data.split=tran is none of its splits; set data.split to one of train" in message(folder, split="tran")
    assert "has no splits; leave data.split out" in message(folder / "train", split="train")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_bytes_and_rows_without(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array([picture(1), None, picture(2), b""], kind)
    table = pa.table([column, pa.array(["one", "none", "two", "empty"])], names=["image", "text"])
    index = DatasetsSource(dir=str(forms.as_dataset(tmp_path, tmp_path / "saved", table))).scan()
    assert {item.caption: item.open().read() for item in index.items} == {"one": picture(1), "two": picture(2)}
    assert sorted(skip.reason[:20] for skip in index.skipped) == ["no image in this row", "not a readable image"]


def test_images_that_were_not_taken_in_are_read_where_they_are(images: Path, tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": str(images / "00.png")}, {"bytes": None, "path": "/none.png"}, None]
    table = pa.table([pa.array(rows, forms.IMAGE), pa.array(["a", "b", "c"])], names=["image", "text"])
    index = DatasetsSource(dir=str(forms.as_dataset(images, tmp_path / "saved", table))).scan()
    assert [item.open().read() for item in index.items] == [(images / "00.png").read_bytes()]
    assert sorted(skip.reason for skip in index.skipped) == ["no image in this row", "no such file"]


def test_a_saved_folder_in_a_store(images: Path, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.put(str(forms.as_dataset(images, tmp_path / "saved")), "/saved", recursive=True)
    try:
        index = DatasetsSource(dir="memory://saved").scan()
        assert index.fingerprint() == FolderSource(images).scan().fingerprint()
        wanted = {data for _, data, _ in forms.pairs(images)}
        assert {item.open().read() for item in index.items} == wanted
    finally:
        system.rm("/saved", recursive=True)


def test_all_files_of_a_saved_folder_are_read_and_a_missing_one_is_told(images: Path, tmp_path: Path) -> None:
    saved = forms.as_dataset(images, tmp_path / "saved")
    first, second = saved / "data-00000-of-00001.arrow", saved / "more.arrow"
    with pa.ipc.open_stream(first.read_bytes()) as stream:
        whole = stream.read_all()
    for path, part in ((first, whole.slice(0, 7)), (second, whole.slice(7))):
        with pa.ipc.new_stream(str(path), whole.schema) as writer:
            writer.write_table(part)
    (saved / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": first.name}, {"filename": second.name}]})
    )
    assert DatasetsSource(str(saved)).scan().fingerprint() == FolderSource(images).scan().fingerprint()
    second.unlink()
    with pytest.raises(UserError, match=r"^data\.dir=.*more\.arrow: .*No such file"):
        DatasetsSource(str(saved)).scan()
    with pytest.raises(UserError, match=r"^data\.dir=.*arrow: a file; set data\.dir to the folder"):
        DatasetsSource(str(first)).scan()


def test_what_is_no_saved_folder_is_told(images: Path, tmp_path: Path) -> None:
    assert "no state.json there; set data.dir to a folder that save_to_disk has made" in message(images)
    folder = forms.as_dataset(images, tmp_path / "saved")
    for state, part in (
        ("{", "state.json"), ("[]", "not what save_to_disk writes"), ("{}", "lists no files"),
        ('{"_data_files": [{"filename": "../../etc/passwd"}]}', "lies outside of it"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', "lies outside of it"),
        ('{"_data_files": 3}', "lists no files"), ("[" * 100_000, "state.json"),
        ('{"_data_files": [{"filename": "x"}], "_indices_data_files": [{"filename": "i.arrow"}]}', "early version"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow"),
    ):  # fmt: skip
        (folder / "state.json").write_text(state)
        assert part in message(folder), state


@pytest.mark.parametrize("cut", [0, 50, 2000])
def test_a_damaged_file_is_told(images: Path, tmp_path: Path, cut: int) -> None:
    data = next(forms.as_dataset(images, tmp_path / "saved").glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:cut])
    assert message(tmp_path / "saved").startswith(f"data.dir={data}: ")


def test_lengths_that_lead_out_of_the_file_are_told(tmp_path: Path) -> None:
    table = pa.table([pa.array([picture(1), picture(2)]), pa.array(["a", "b"])], names=["image", "text"])
    data = next(forms.as_dataset(tmp_path, tmp_path / "saved", table).glob("*.arrow"))
    raw = data.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, len(picture(1)), len(picture(1)) + len(picture(2))))
    assert raw.count(offsets) == 1
    data.write_bytes(raw.replace(offsets, offsets[:8] + (1 << 30).to_bytes(4, "little")))
    assert message(tmp_path / "saved").startswith(f"data.dir={data}: ")


def test_compressed_batches_are_told(tmp_path: Path) -> None:
    table = pa.table([pa.array([picture(1)]), pa.array(["a"])], names=["image", "text"])
    data = next(forms.as_dataset(tmp_path, tmp_path / "saved", table).glob("*.arrow"))
    with pa.ipc.new_stream(str(data), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(pa.table([pa.array([bytes(50_000)]), pa.array(["a"])], names=["image", "text"]))
    assert "compressed" in message(tmp_path / "saved")
