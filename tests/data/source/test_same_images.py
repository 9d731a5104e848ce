"""The same images in every form: the same index, the same bytes, and the same losses, step by step."""

import pickle
from pathlib import Path

import pytest

from nai_xl import config
from nai_xl.data.index import Index
from nai_xl.data.source import Source
from nai_xl.data.source.datasets import DatasetsSource
from nai_xl.data.source.folder import FolderSource
from nai_xl.data.source.mix import MixSource
from nai_xl.data.source.shards import ShardsSource
from nai_xl.data.source.table import TableSource
from nai_xl.train import train
from tests.data.source import forms
from tests.test_train import losses


def content(index: Index) -> list[object]:
    return [(item.content, item.captions, item.size) for item in index.items]


@pytest.fixture
def sources(images: Path, tmp_path: Path) -> dict[str, Source]:
    return {
        "shards": ShardsSource(files=str(forms.as_shards(images, tmp_path / "shards"))),
        "table": TableSource(files=str(forms.as_table(images, tmp_path / "table.parquet"))),
        "datasets": DatasetsSource(dir=str(forms.as_dataset(images, tmp_path / "saved"))),
    }


def test_index_and_bytes_are_those_of_the_folder(images: Path, sources: dict[str, Source]) -> None:
    folder = FolderSource(images).scan()
    halves = {f"half {n}": ShardsSource(files=f"{images.parent}/shards/{n}.tar") for n in range(2)}
    for name, source in {**sources, "mix": MixSource(halves)}.items():
        for index in (source.scan(), source.scan()):  # made, and found made
            assert content(index) == content(folder) and index.fingerprint() == folder.fingerprint(), name
            assert not index.skipped
            sent = pickle.loads(pickle.dumps(index.items))  # noqa: S301 - as it is sent to workers
            for item, again, there in zip(index.items, sent, folder.items, strict=True):
                assert item.open().read() == again.open().read() == there.path.read_bytes()


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_same_images_are_held_out(images: Path, sources: dict[str, Source], share: float) -> None:
    wanted = [item.content for item in FolderSource(images, held_out=share).scan().held_out]
    assert 0 < len(wanted) < 12
    for source in [*sources.values(), MixSource(sources={"one": FolderSource(images)}, held_out=share)]:
        held = source if isinstance(source, MixSource) else type(source)(**{**vars(source), "held_out": share})
        assert [item.content for item in held.scan().held_out] == wanted


def test_losses_are_those_of_the_folder_step_by_step(
    images: Path, tmp_path: Path, sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(option: str, *data: str) -> dict[int, float]:
        short = "tracker=jsonl run.batch_size=2 run.log_every=1 run.max_images=6 lr.warmup=0 evals=[] cache=memory"
        cfg = config.compose([f"data={option}", *data, f"name={option}", *short.split()])
        config.check(cfg)
        return losses(train(cfg, {}))

    wanted = run("folder", f"data.dir={images}")
    assert len(wanted) == 3 and len({*wanted.values()}) == 3
    assert run("shards", "data.files='shards/{0..1}.tar'", "run.workers=2") == wanted
    assert run("table", "data.files=table.parquet") == wanted
    assert run("datasets", "data.dir=saved") == wanted
