"""A folder of captioned images in the other forms that data sets have, written by the usual libraries."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the feature Image of Hugging Face's datasets
FEATURES = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}


def pairs(folder: Path) -> list[tuple[str, bytes, str]]:
    """Name, bytes and caption of every image."""
    return [(p.name, p.read_bytes(), p.with_suffix(".txt").read_text()) for p in sorted(folder.glob("*.png"))]


def table_of(folder: Path) -> pa.Table:
    columns = [
        pa.array([{"bytes": data, "path": name} for name, data, _ in pairs(folder)], IMAGE),
        pa.array([caption for _, _, caption in pairs(folder)]),
    ]
    return pa.table(columns, names=["image", "text"])


def as_shards(folder: Path, to: Path) -> Path:
    """Two tar files, 0.tar and 1.tar."""
    to.mkdir()
    names = sorted(path.stem for path in folder.glob("*.png"))
    for number in range(2):
        with tarfile.open(to / f"{number}.tar", "w") as tar:
            for name in names[number::2]:
                for suffix in ("png", "txt"):
                    tar.add(folder / f"{name}.{suffix}", f"{name}.{suffix}")
    return to


def as_table(folder: Path, to: Path, **options: Any) -> Path:
    pq.write_table(table_of(folder), to, **{"row_group_size": 5, **options})
    return to


def as_dataset(folder: Path, to: Path, table: pa.Table | None = None) -> Path:
    """What Dataset.save_to_disk writes: Arrow streams with a schema that repeats the features, and two json files."""
    to.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    table = table if table is not None else table_of(folder)
    about = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    with pa.ipc.new_stream(str(to / name), table.schema.with_metadata(about)) as writer:
        writer.write_table(table, max_chunksize=5)
    state = {
        "_data_files": [{"filename": name}],
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (to / "state.json").write_text(json.dumps(state))
    (to / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "", "features": FEATURES}))
    return to


def as_splits(folder: Path, to: Path) -> Path:
    """What DatasetDict.save_to_disk writes."""
    for split in ("train", "test"):
        as_dataset(folder, to / split)
    (to / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return to
