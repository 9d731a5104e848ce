"""Encoding by one process or several, and by several runs that begin together."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import HashStore

from nai_xl import config
from nai_xl.data.cache import DiskCache, MemoryCache
from nai_xl.data.images import on_canvas, to_pixels
from nai_xl.data.index import Index
from nai_xl.data.loader import read
from nai_xl.data.placement_table import PlacementTable
from nai_xl.data.rows import Item
from nai_xl.distributed.team import Alone, StoreTeam, Team
from nai_xl.engine import encode as module
from nai_xl.engine import overlap
from nai_xl.engine.encode import Encoder
from nai_xl.errors import UserError
from nai_xl.interfaces import Cache
from nai_xl.model.vae import encode_pixels

CPU = torch.device("cpu")


@pytest.fixture
def parts() -> tuple[Any, Any, Any]:
    cfg = config.compose([])
    components, bucketing, text = (config.build(cfg[group]) for group in ("model", "bucketing", "text"))
    return components, bucketing, text


@pytest.fixture
def index(images: Path) -> Index:
    scanned: Index = config.build(config.compose(["data=folder", f"data.dir={images}"]).data).scan()
    return scanned


def tensors_of(cache: Cache, keys: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    return {key: dict(read(cache, key)) for key in keys}


@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_that_begin_together_encode_each_image_and_caption_once(
    ranks: int, index: Index, parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components, bucketing, text = parts
    put: list[str] = []
    write = DiskCache.put
    monkeypatch.setattr(DiskCache, "put", lambda self, key, made: (put.append(key), write(self, key, made)))
    runs = 3
    together = Barrier(runs * ranks)
    stores = [HashStore() for _ in range(runs)]

    def encode(number: int) -> dict[str, str]:
        run, rank = divmod(number, ranks)
        team = StoreTeam(stores[run], rank, ranks)
        encoder = Encoder(components, DiskCache(tmp_path / "cache"), "fp32", CPU, team=team)
        refs = encoder.latent_refs(index, bucketing)
        together.wait()
        assert encoder.encode_images([refs]) == {}
        captions = [item.caption for item in index.items]
        keys = encoder.encode_captions(lambda: captions, text.chunks)
        return {caption: keys(caption) for caption in ["", *captions]}

    with ThreadPoolExecutor(runs * ranks) as pool:
        keys = list(pool.map(encode, range(runs * ranks)))
    assert len(put) == len(set(put)) == 12 + 13  # images, and their captions and the empty one
    assert set(keys[0].values()) <= set(put)


def test_a_slow_rank_leaves_the_work_to_a_fast_one(
    images: Path, parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By how many batches each has encoded, while one of them stands still."""
    components, bucketing, _ = parts
    monkeypatch.setattr(module, "TOGETHER", 1)
    items = config.build(config.compose(["data=folder", f"data.dir={images}"]).data).scan()
    store, done = HashStore(), [0, 0]
    cache = DiskCache(tmp_path)

    class Rank(Encoder):
        def _put_latents(self, made: Any) -> None:
            super()._put_latents(made)
            done[self.team.rank] += len(made)
            while self.team.rank == 1 and sum(done) < 12 - module.AHEAD - overlap.BEHIND - 1:
                time.sleep(0.01)

    def encode(rank: int) -> None:
        encoder = Rank(components, cache, "fp32", CPU, team=StoreTeam(store, rank, 2))
        encoder.encode_images([encoder.latent_refs(items, bucketing)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(encode, range(2)))
    assert sum(done) == 12 and done[1] <= module.AHEAD + overlap.BEHIND + 2


def test_entries_with_wrong_bytes_are_made_anew_and_counted(
    index: Index, parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    components, bucketing, _ = parts
    encoder = Encoder(components, DiskCache(tmp_path), "fp32", CPU)
    refs = encoder.latent_refs(index, bucketing)
    encoder.encode_images([refs])
    keys = [row[0].key for row in refs]
    before = tensors_of(encoder.cache, keys)
    for path in sorted(tmp_path.rglob("*.safetensors"))[:2]:
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))  # of its last entry
    assert "damaged" not in capsys.readouterr().err
    again = replace(encoder, cache=DiskCache(tmp_path))
    again.encode_images([refs])
    assert "2 damaged entries made anew" in capsys.readouterr().err
    after = tensors_of(DiskCache(tmp_path), keys)
    assert all(torch.equal(before[key]["latents"], after[key]["latents"]) for key in keys)
    again.encode_images([refs])
    assert "damaged" not in capsys.readouterr().err


def test_what_else_there_is_to_encode_does_not_show_in_a_single_bit(index: Index, parts: Any, tmp_path: Path) -> None:
    components, bucketing, text = parts
    items = index.items

    def encoded(name: str, *groups: Sequence[Item]) -> dict[str, dict[str, torch.Tensor]]:
        encoder = Encoder(components, DiskCache(tmp_path / name), "fp32", CPU)
        keys: list[str] = []
        for group in groups:
            part = Index(group)
            refs = encoder.latent_refs(part, bucketing)
            assert encoder.encode_images([refs]) == {}
            keys += [ref.key for row in refs for ref in row]
            captions = [item.caption for item in group]
            keys += map(encoder.encode_captions(lambda captions=captions: captions, text.chunks), ["", *captions])
        return tensors_of(encoder.cache, keys)

    together = encoded("together", items)
    apart = encoded("apart", items[-1:], items[3:5], items)
    assert together.keys() == apart.keys()
    assert all(torch.equal(row[name], apart[key][name]) for key, row in together.items() for name in row)


def test_latents_are_the_autoencoders_of_the_placed_picture_in_every_precision(index: Index, parts: Any) -> None:
    components, _, _ = parts
    bucketing = config.build(config.compose(["bucketing=square", "bucketing.flip=true", "bucketing.crops=2"]).bucketing)
    for stored, dtype in module.TYPES.items():
        encoder = Encoder(components, MemoryCache(), "fp32", CPU, stored)
        refs = encoder.latent_refs(index, bucketing)
        encoder.encode_images([refs])
        assert len(encoder.cache.entries) == sum(map(len, refs)) > 2 * len(index.items)  # type: ignore[attr-defined]
        for item, ref in [(item, ref) for item, row in zip(index.items, refs, strict=True) for ref in row][::5]:
            size = ref.placement.bucket.at_once(module.PIXELS, most=module.TOGETHER)
            pixels = to_pixels(on_canvas(Image.open(item.path).convert("RGB"), ref.placement))
            expected = encode_pixels(components.vae, torch.stack([pixels] * size))[0]
            assert torch.equal(read(encoder.cache, ref.key)["latents"], expected.to(dtype))


def test_precisions_do_not_share_an_entry(index: Index, parts: Any) -> None:
    components, bucketing, _ = parts
    keys = {
        row[0].key
        for dtype in ("fp32", "bf16")
        for stored in module.TYPES
        for row in Encoder(components, MemoryCache(), dtype, CPU, stored).latent_refs(index, bucketing)  # type: ignore[arg-type]
    }
    assert len(keys) == 6 * 12


@pytest.mark.parametrize("shared", [True, False])
def test_a_picture_that_cannot_be_read_is_told_by_the_rank_that_met_it(
    shared: bool, images: Path, index: Index, parts: Any, tmp_path: Path
) -> None:
    components, bucketing, _ = parts
    (images / "05.png").write_bytes((images / "05.png").read_bytes()[:200])
    store = HashStore()

    def encode(rank: int) -> dict[Path, str]:
        cache: Cache = DiskCache(tmp_path / "cache") if shared else MemoryCache()
        encoder = Encoder(components, cache, "fp32", CPU, team=StoreTeam(store, rank, 2))
        return encoder.encode_images([encoder.latent_refs(index, bucketing)])

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(encode, range(2)))
    assert [*map(len, found)].count(1) == (1 if shared else 2)
    assert {path.name for bad in found for path in bad} == {"05.png"}


def test_too_little_room_is_told_before_anything_is_encoded(
    index: Index, parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components, bucketing, text = parts
    encoder = Encoder(components, DiskCache(tmp_path, max_gb=1e-6), "fp32", CPU)
    monkeypatch.setattr(module, "encode_pixels", lambda *_: pytest.fail("it was encoded"))
    refs = encoder.latent_refs(index, bucketing)
    with pytest.raises(UserError, match=r"cache\.max_gb=1e-06: .* MB .*cache\.dir=DIR.*latents\.stored=bf16.*crops"):
        encoder.encode_images([refs])
    assert encoder.bytes_of_captions(lambda: ["one", "two", "one"], 2) == 3 * 4 * (2 * 77 * 160 + 96)
    with pytest.raises(UserError, match=r"cache\.max_gb=.*text=live"):
        encoder.encode_captions(list, text.chunks)


def test_the_bytes_that_are_expected_are_those_that_are_written(index: Index, parts: Any, tmp_path: Path) -> None:
    components, bucketing, text = parts
    needed: list[int] = []

    class Measuring(DiskCache):
        def refuse_too_little_room(self, needed_: int, smaller: str) -> None:
            needed.append(needed_)

    encoder = Encoder(components, Measuring(tmp_path), "fp32", CPU, "bf16")
    encoder.encode_images([encoder.latent_refs(index, bucketing)])
    encoder.encode_captions(lambda: ["one", "two"], text.chunks)
    headers = 4096 * len(list(tmp_path.rglob("*.safetensors")))
    assert sum(needed) == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) - headers


def test_an_error_of_the_writer_ends_the_encoding_and_the_same_call_goes_on(
    index: Index, parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full after a few entries, and has room again."""
    components, bucketing, _ = parts
    write, left = os.pwrite, [20]

    def full(file: int, data: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0 and len(data) > 100:
            raise OSError(28, "No space left on device")
        return write(file, data, offset)

    encoder = Encoder(components, DiskCache(tmp_path), "fp32", CPU)
    refs = encoder.latent_refs(index, bucketing)
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(UserError, match=r"cache\.dir=.*No space left on device.*same command again"):
            encoder.encode_images([refs])
    made = int((~DiskCache(tmp_path).missing(PlacementTable.of([refs]).keys(encoder._latents_made_by))).sum())
    assert 0 < made < 12
    again = Encoder(components, DiskCache(tmp_path), "fp32", CPU)
    put: list[str] = []
    monkeypatch.setattr(DiskCache, "put", counting(put, DiskCache.put))
    again.encode_images([refs])
    assert len(put) == 12 - made
    whole = Encoder(components, MemoryCache(), "fp32", CPU)
    whole.encode_images([refs])
    for row in refs:
        assert torch.equal(read(again.cache, row[0].key)["latents"], read(whole.cache, row[0].key)["latents"])


def counting(put: list[str], write: Callable[..., None]) -> Callable[..., None]:
    def counted(self: Any, key: str, tensors: Any) -> None:
        put.append(key)
        write(self, key, tensors)

    return counted


def test_every_ticket_is_given_once_and_what_the_first_says_reaches_all() -> None:
    store, world = HashStore(), 3

    def work(rank: int) -> tuple[list[bytes], list[int]]:
        team: Team = StoreTeam(store, rank, world)
        words, taken = [], []
        for number in range(2):
            words.append(team.told(f"word {number}".encode() if rank == 0 else None))
            for ticket in team.tickets():
                if ticket >= 20:
                    break
                taken.append(100 * number + ticket)
            team.wait()
        return words, taken

    with ThreadPoolExecutor(world) as pool:
        found = list(pool.map(work, range(world)))
    assert all(words == [b"word 0", b"word 1"] for words, _ in found)
    assert sorted(ticket for _, taken in found for ticket in taken) == [*range(20), *range(100, 120)]
    alone = Alone()
    assert alone.told(b"x") == b"x" and next(alone.tickets()) == 0 == next(alone.tickets())


def test_batches_share_a_canvas_and_hold_every_row_once(index: Index, parts: Any) -> None:
    components, bucketing, _ = parts
    table = PlacementTable.of([Encoder(components, MemoryCache(), "fp32", CPU).latent_refs(index, bucketing)])
    some = np.array([0, 2, 3, 5, 7, 11])
    batches = module.Batches(table, table.by_bucket(some))
    rows = [list(batches[ticket]) for ticket in range(len(batches))]
    assert sorted(row for batch in rows for row in batch) == some.tolist()
    assert [batches.before(ticket) for ticket in range(len(batches))] == np.cumsum([0, *map(len, rows)])[:-1].tolist()
    for batch in rows:
        assert len({table.job(row)[1].bucket for row in batch}) == 1
        assert table.sides(np.array(batch)).tolist() == [[*table.job(row)[1].bucket] for row in batch]
