"""Encoding by several runs that begin together."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from nai_xl import config
from nai_xl.data.cache import DiskCache
from nai_xl.data.index import Index
from nai_xl.data.loader import read
from nai_xl.data.rows import Item
from nai_xl.engine.encode import Encoder


@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_that_begin_together_encode_each_image_and_caption_once(
    ranks: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config.compose([])
    components, bucketing, text = (config.build(cfg[group]) for group in ("model", "bucketing", "text"))
    index = config.build(config.compose(["data=folder", f"data.dir={images}"]).data).scan()
    put: list[str] = []
    write = DiskCache.put
    monkeypatch.setattr(DiskCache, "put", lambda self, key, made: (put.append(key), write(self, key, made)))
    runs = 3
    together = Barrier(runs * ranks)

    def encode(rank: int) -> dict[str, str]:
        encoder = Encoder(components, DiskCache(tmp_path / "cache"), "fp32", torch.device("cpu"), rank, ranks)
        refs = encoder.latent_refs(index, bucketing)
        together.wait()
        assert encoder.encode_images([refs]) == {}
        return encoder.encode_captions([item.caption for item in index.items], text.chunks)

    with ThreadPoolExecutor(runs * ranks) as pool:
        keys = list(pool.map(encode, [rank for _ in range(runs) for rank in range(ranks)]))
    assert len(put) == len(set(put)) == 12 + 13  # images, and their captions and the empty one
    assert set(keys[0].values()) <= set(put)


def test_entries_with_wrong_bytes_are_made_anew_and_counted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    components, bucketing = (config.build(config.compose([])[group]) for group in ("model", "bucketing"))
    index = config.build(config.compose(["data=folder", f"data.dir={images}"]).data).scan()
    encoder = Encoder(components, DiskCache(tmp_path), "fp32", torch.device("cpu"))
    refs = encoder.latent_refs(index, bucketing)
    encoder.encode_images([refs])
    files = sorted(tmp_path.rglob("*.safetensors"))
    before = [path.read_bytes() for path in files]
    for path, content in zip(files[:2], before, strict=False):
        path.write_bytes(content[:-8] + bytes(8))
    assert "damaged" not in capsys.readouterr().err
    encoder.encode_images([refs])
    assert "2 damaged entries made anew" in capsys.readouterr().err
    assert [path.read_bytes() for path in files] == before


def test_what_else_there_is_to_encode_does_not_show_in_a_single_bit(images: Path, tmp_path: Path) -> None:
    cfg = config.compose([])
    components, bucketing, text = (config.build(cfg[group]) for group in ("model", "bucketing", "text"))
    index = config.build(config.compose(["data=folder", f"data.dir={images}"]).data).scan()
    items = index.items

    def encoded(name: str, *groups: Sequence[Item]) -> dict[str, dict[str, torch.Tensor]]:
        encoder = Encoder(components, DiskCache(tmp_path / name), "fp32", torch.device("cpu"))
        keys: list[str] = []
        for group in groups:
            part = Index(group)
            refs = encoder.latent_refs(part, bucketing)
            assert encoder.encode_images([refs]) == {}
            keys += [ref.key for row in refs for ref in row]
            keys += encoder.encode_captions([item.caption for item in group], text.chunks).values()
        return {key: dict(read(encoder.cache, key)) for key in keys}

    together = encoded("together", items)
    apart = encoded("apart", items[-1:], items[3:5], items)
    assert together.keys() == apart.keys()
    assert all(torch.equal(row[name], apart[key][name]) for key, row in together.items() for name in row)
