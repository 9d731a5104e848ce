"""The cache of encoded tensors: whole entries or none, in shards that anybody can read."""

import copy
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from nai_xl.data import cache as module
from nai_xl.data.cache import DiskCache, MemoryCache, content_key, key_bytes
from nai_xl.data.shards import catalogue
from nai_xl.errors import UserError
from nai_xl.files import user_cache, write_atomically
from nai_xl.interfaces import Cache

KEY = content_key("latent", 1)[:32]
KEYS = [content_key("key", number)[:32] for number in range(40)]


def tensors(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=draw) for shape in ((4, 3, 2), (5,), (6, 4))]
    return {"latents": made[0], "half": made[1].half(), "view": made[2].T[1:, ::2]}


def latents(seed: int = 0) -> dict[str, Tensor]:
    return {"latents": torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()}


def same(found: dict[str, Tensor] | None, written: dict[str, Tensor]) -> bool:
    return (
        found is not None
        and found.keys() == written.keys()
        and all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in written.items())
    )


def sealed(cache: DiskCache) -> list[Path]:
    return sorted(cache.root.rglob("*.safetensors"))


def whole(cache: Cache, keys: list[str] = KEYS) -> list[str]:
    """Those keys whose entry is there, after a check that it is the one that belongs to the key."""
    there = [key for key in keys if key in cache]
    for key in there:
        assert same(cache.get(key), latents(keys.index(key)))
    return there


def filled(folder: Path, count: int = 40) -> DiskCache:
    """A cache of KEYS, as a run leaves it."""
    cache = DiskCache(folder)
    with cache.alone("encoding"):
        for number, key in enumerate(KEYS[:count]):
            cache.put(key, latents(number))
    return cache


def packed(keys: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(map(key_bytes, keys)), np.uint8).reshape(-1, 16)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four latents."""
    monkeypatch.setattr("nai_xl.data.shards.shard.FULL", 4 * 512)
    monkeypatch.setattr(module, "FULL", 4 * 512)


# --- entries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["disk", "memory"])
@pytest.mark.parametrize("key", [KEY, "any other text"])
def test_entries_come_back_bit_for_bit(kind: str, key: str, tmp_path: Path) -> None:
    cache: Cache = DiskCache(tmp_path) if kind == "disk" else MemoryCache()
    assert key not in cache and cache.get(key) is None
    cache.put(key, tensors(1))
    assert key in cache and same(cache.get(key), tensors(1))
    cache.put(key, tensors(2))
    assert same(cache.get(key), tensors(2))
    assert cache.missing(packed([key, KEYS[3]])).tolist() == [kind == "memory" and len(key) != 32, True]
    cache.discard(key)
    assert key not in cache and cache.get(key) is None


SHAPES = st.lists(st.integers(0, 4), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.int64])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    described=st.dictionaries(st.text("abc/ é", max_size=5), st.tuples(DTYPES, SHAPES), max_size=4),
    rows=st.integers(1, 3),
)
def test_any_tensors_can_be_an_entry_and_the_library_reads_the_same_bytes(
    described: dict[str, tuple[torch.dtype, list[int]]], rows: int, tmp_path: Path
) -> None:
    folder = tmp_path / os.urandom(6).hex()
    cache = DiskCache(folder)
    draw = torch.Generator().manual_seed(0)
    entries = [
        {
            name: torch.randint(
                0, 2, (max(1, torch.empty(shape, dtype=dtype).nbytes),), generator=draw, dtype=torch.uint8
            )
            .repeat(dtype.itemsize)[: torch.empty(shape, dtype=dtype).nbytes]
            .view(dtype)
            .view(shape)
            for name, (dtype, shape) in described.items()
        }
        for _ in range(rows)
    ]
    for key, entry in zip(KEYS, entries, strict=False):
        cache.put(key, entry)
    cache.seal()
    assert all(same(DiskCache(folder).get(key), entry) for key, entry in zip(KEYS, entries, strict=False))
    (path,) = sealed(cache)
    with safe_open(path, "pt") as file:
        (name,) = file.keys()
        table, pieces = file.get_tensor(name), json.loads(file.metadata()["pieces"])
    assert len(table) == rows
    for row, entry in zip(table, entries, strict=True):
        data = row.contiguous().view(-1).view(torch.uint8) if row.numel() else torch.empty(0, dtype=torch.uint8)
        for piece, _, _, start in pieces:
            expected = entry[piece].contiguous().view(-1).view(torch.uint8) if entry[piece].numel() else data[:0]
            assert torch.equal(data[start : start + len(expected)], expected)


def test_a_shard_of_latents_is_a_tensor_of_latents_to_anybody(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    (path,) = sealed(cache)
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("latents"), torch.stack([latents(n)["latents"] for n in range(40)]))


def test_shards_end_when_they_are_full_and_the_next_run_goes_on_with_the_last(
    tmp_path: Path, small_shards: None
) -> None:
    cache = filled(tmp_path, 10)
    assert len(sealed(cache)) == 3
    again = DiskCache(tmp_path)
    with again.alone("encoding"):
        for number in (10, 11, 12):
            again.put(KEYS[number], latents(number))
    assert len(sealed(again)) == 4 and whole(DiskCache(tmp_path)) == KEYS[:13]
    assert not list(tmp_path.rglob("*.open"))


def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        filled(tmp_path / "cache", 3).discard(KEYS[0])
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_another_process_finds_what_was_written_before_it_is_sealed(tmp_path: Path) -> None:
    cache, reader = DiskCache(tmp_path), DiskCache(tmp_path)
    assert KEY not in reader
    cache.put(KEY, tensors())
    assert KEY in reader and same(reader.get(KEY), tensors()) and not sealed(cache)
    assert same(copy.copy(cache).get(KEY), tensors())
    assert DiskCache.shared and not MemoryCache.shared


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_index_finds_what_the_keys_of_the_shards_say_whatever_became_of_it(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, 21)
    index = tmp_path / "shards" / catalogue.MERGED
    content = index.read_bytes()
    half = filled(tmp_path, 9) and index.read_bytes()
    for damage in (content, content[:100], content[:-100], b"", b"\xff" * 300, half):
        index.write_bytes(damage)
        assert DiskCache(tmp_path).missing(packed(KEYS)).tolist() == [False] * 21 + [True] * 19
        assert whole(DiskCache(tmp_path)) == KEYS[:21]
    index.unlink()
    assert whole(DiskCache(tmp_path)) == KEYS[:21]


def test_a_start_with_an_index_reads_no_keys_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    for name in ("read_line", "read_records"):
        monkeypatch.setattr(catalogue, name, lambda *_: pytest.fail("keys were read"))
    assert not DiskCache(tmp_path).missing(packed(KEYS)).any() and whole(DiskCache(tmp_path)) == KEYS


def test_keys_that_share_a_half_are_told_apart(tmp_path: Path) -> None:
    keys = [first + second for first in ("ab" * 8, "cd" * 8) for second in ("00" * 8, "11" * 8, "22" * 8)]
    cache = DiskCache(tmp_path)
    with cache.alone("encoding"):
        for number, key in enumerate(keys[::2]):
            cache.put(key, latents(number))
    for reader in (cache, DiskCache(tmp_path)):
        assert reader.missing(packed(keys)).tolist() == [False, True] * 3
        assert [same(reader.get(key), latents(n)) for n, key in enumerate(keys[::2])] == [True] * 3
        assert all(reader.get(key) is None for key in keys[1::2])


def test_a_cache_that_is_moved_or_copied_still_works(tmp_path: Path, small_shards: None) -> None:
    filled(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    (tmp_path / "first").rename(tmp_path / "moved")
    assert whole(DiskCache(tmp_path / "copy")) == whole(DiskCache(tmp_path / "moved")) == KEYS


def test_shards_can_be_deleted_one_by_one(tmp_path: Path, small_shards: None) -> None:
    cache = filled(tmp_path)
    place = Path(cache.place(KEYS[5]).partition(", row ")[0])
    place.unlink()
    again = DiskCache(tmp_path)
    lost = [key for key in KEYS if again.missing(packed([key]))[0]]
    assert KEYS[5] in lost and len(lost) == 4 and whole(again) == [key for key in KEYS if key not in lost]
    filled(tmp_path)
    assert whole(DiskCache(tmp_path)) == KEYS


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 10, 4096 + 512 * 3 + 5, 4096 + 512 * 40 - 1])
def test_entries_of_a_shard_that_was_cut_count_as_missing_and_are_made_anew(tmp_path: Path, left: int) -> None:
    (path,) = sealed(filled(tmp_path))
    os.truncate(path, left)
    cache = DiskCache(tmp_path)
    there = max(0, left - 4096) // 512
    assert cache.missing(packed(KEYS)).tolist() == [number >= there for number in range(40)]
    assert whole(cache) == KEYS[:there]
    assert whole(filled(tmp_path)) == KEYS == whole(DiskCache(tmp_path))


@pytest.mark.parametrize("damage", ["bit", "zeros", "swapped rows"])
def test_an_entry_with_other_bytes_is_found_when_it_is_read_and_gone_for_the_next_look(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = sealed(filled(tmp_path))
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[4096 + 600] ^= 4
    elif damage == "zeros":
        content[4096 + 700 : 4096 + 760] = bytes(60)
    else:
        content[4096 + 512 : 4096 + 1536] = content[4096 + 1024 : 4096 + 1536] + content[4096 + 512 : 4096 + 1024]
    path.write_bytes(content)
    bad = KEYS[1:3] if damage == "swapped rows" else KEYS[1:2]
    cache = DiskCache(tmp_path)
    assert not cache.missing(packed(KEYS)).any()  # which looks at lengths alone
    assert [key for key in KEYS if cache.get(key) is None] == bad
    for reader in (cache, DiskCache(tmp_path)):
        assert reader.missing(packed(KEYS)).sum() == len(bad) and bad[0] not in reader
    with reader.alone("encoding"):
        assert f"{len(bad)} damaged entr" in capsys.readouterr().err
        for key in bad:
            reader.put(key, latents(KEYS.index(key)))
    assert whole(reader) == whole(DiskCache(tmp_path)) == KEYS
    with DiskCache(tmp_path).alone("encoding"):
        assert "damaged" not in capsys.readouterr().err


def test_no_bit_of_any_file_can_change_what_is_read(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    files = [path for path in (tmp_path / "shards").iterdir() if path.is_file() and not path.name.startswith(".")]
    contents = {path: path.read_bytes() for path in files}
    draw = np.random.default_rng(0)
    for path, content in contents.items():
        for place in draw.integers(0, 8 * len(content), 150).tolist():
            changed = bytearray(content)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            cache = DiskCache(tmp_path)
            for number, found in enumerate(map(cache.get, KEYS[:3])):
                assert found is None or same(found, latents(number))
            for name in (tmp_path / "shards").glob("*.dead"):
                name.unlink()
        path.write_bytes(content)
    assert whole(DiskCache(tmp_path)) == KEYS[:3]


def test_a_folder_that_cannot_be_read_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("in the way")
    cache = DiskCache(tmp_path)
    for look in (cache.get, cache.__contains__):
        with pytest.raises(UserError, match=r"cache\.dir=.*cannot be read.*set cache\.dir=DIR"):
            look(KEY)


# --- writers that end early -------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Room for `after` more bytes."""
    write, left = os.pwrite, [after]

    def written(file: int, data: Any, offset: int) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(file, memoryview(data)[: left[0]], offset)
        left[0] -= count
        return count

    monkeypatch.setattr(os, "pwrite", written)


@pytest.mark.parametrize("after", [0, 100, 4200, 4900, 5400, 6000, 9000])
def test_a_disk_that_fills_up_is_an_error_and_what_was_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    cache = DiskCache(tmp_path)
    done = 0
    with monkeypatch.context() as patch:
        full_disk(patch, after)
        with pytest.raises(UserError, match=r"cache\.dir=.*No space left.*free space.*same command again"):
            for number, key in enumerate(KEYS):
                cache.put(key, latents(number))
                done += 1
    for reader in (cache, DiskCache(tmp_path)):
        assert whole(reader) == KEYS[:done]
    for number in range(done, 40):  # the same process, which has been given room
        cache.put(KEYS[number], latents(number))
    cache.seal()
    assert whole(DiskCache(tmp_path)) == KEYS
    with safe_open(sealed(cache)[0], "pt") as file:
        assert len(file.get_tensor("latents")) == 40


def in_a_process(work: Callable[[], None]) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


def test_a_process_with_a_limit_to_its_files_keeps_what_it_has_written(tmp_path: Path) -> None:
    """The real error of a real write, where a row is cut in the middle."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + 512 * 5 + 200,) * 2)
        filled(tmp_path)

    assert in_a_process(limited) == 1
    assert whole(DiskCache(tmp_path)) == KEYS[:5]
    assert whole(filled(tmp_path)) == KEYS and len(sealed(DiskCache(tmp_path))) == 1


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 9])
def test_a_writer_that_is_killed_leaves_whole_entries_and_its_shard_is_sealed_by_the_next(
    tmp_path: Path, at: int
) -> None:
    """Killed in the middle of its `at`th write: of a header, a row or a record."""

    def killed() -> None:
        write, calls = os.pwrite, [0]

        def dying(file: int, data: Any, offset: int) -> int:
            calls[0] += 1
            if calls[0] == at:
                write(file, memoryview(data)[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(file, data, offset)

        os.pwrite = dying
        filled(tmp_path)

    assert in_a_process(killed) == -signal.SIGKILL
    there = max(0, at - 3) // 2  # each entry takes two writes, after those of two headers
    assert whole(DiskCache(tmp_path)) == KEYS[:there]
    if there:
        with DiskCache(tmp_path).alone("encoding"):
            pass
        (path,) = sealed(DiskCache(tmp_path))
        with safe_open(path, "pt") as file:
            assert len(file.get_tensor("latents")) == there
    assert whole(filled(tmp_path)) == KEYS == whole(DiskCache(tmp_path))
    for path in sealed(DiskCache(tmp_path)):
        with safe_open(path, "pt") as file:
            assert file.keys()


def test_no_two_processes_write_one_shard(tmp_path: Path) -> None:
    caches = [DiskCache(tmp_path) for _ in range(3)]
    filled(tmp_path, 2)
    for number in range(2, 40):
        caches[number % 3].put(KEYS[number], latents(number))
    with DiskCache(tmp_path).alone("encoding"):  # adopts none that somebody writes
        pass
    assert len(list(tmp_path.rglob("*.open"))) == 3
    for cache in caches:
        cache.seal()
    assert whole(DiskCache(tmp_path)) == KEYS and len(sealed(caches[0])) == 3


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """From its call on, no file can be made or written, as on a mount without that right."""

    def begin() -> None:
        opened, access = os.open, os.access

        def refusing(path: Any, flags: int, *rest: Any, **given: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, "Read-only file system")
            return opened(path, flags, *rest, **given)

        monkeypatch.setattr(os, "open", refusing)
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))

    yield begin


def test_a_cache_without_the_right_to_write_is_read_and_says_in_one_line_what_it_cannot(
    tmp_path: Path, read_only: Callable[[], None]
) -> None:
    (path,) = sealed(filled(tmp_path, 39))
    content = bytearray(path.read_bytes())
    content[4096 + 10] ^= 1
    path.write_bytes(content)
    read_only()
    cache = DiskCache(tmp_path)
    assert cache.missing(packed(KEYS)).tolist() == [False] * 39 + [True]
    assert cache.get(KEYS[0]) is None and cache.get(KEYS[0]) is None and KEYS[0] not in cache
    assert whole(cache) == KEYS[1:39]
    cache.refuse_too_little_room(10**18, "")  # nothing will be written, whatever room there is
    refused = pytest.raises(UserError, match=r"lacks entries .* cannot be written \(Read-only.*set cache\.dir=DIR")
    with cache.alone("encoding"), refused:
        cache.put(KEYS[39], latents(39))


def test_files_of_an_earlier_version_are_named_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("00", "ab", "ff"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{name}{number}.safetensors").write_bytes(b"old")
    cache = filled(tmp_path, 3)
    with cache.alone("encoding"):  # images, then captions
        cache.put(KEYS[2], latents(2))
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "about 15 files of an earlier version" in told and f"rm -r {tmp_path}/" in told
    assert whole(cache) == KEYS[:3] and len(list(tmp_path.glob("??/*"))) == 15


def test_too_little_room_is_an_error_that_names_what_is_needed_and_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000_000_000))
    cache = DiskCache(tmp_path)
    cache.refuse_too_little_room(90_000_000_000, "")
    with pytest.raises(UserError, match=r"2,000\.0 GB are to be encoded.* 100\.0 GB free.*cache\.dir=DIR.*, or less"):
        cache.refuse_too_little_room(2_000_000_000_000, ", or less")
    small = DiskCache(tmp_path, max_gb=0.001)
    small.put(KEY, {"latents": torch.zeros(200_000)})
    small.refuse_too_little_room(100_000, "")
    with pytest.raises(UserError, match=r"cache\.max_gb=0\.001: 0\.30 MB .* 0\.80 MB .*Raise cache\.max_gb"):
        small.refuse_too_little_room(300_000, "")


@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
def test_unwritable_folder_is_an_error_that_names_the_setting(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cache\.dir=.*file.*cannot be written.*set cache\.dir=DIR"):
        DiskCache(tmp_path / "file" / below)


def test_default_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAI_XL_CACHE", str(tmp_path / "mine"))
    assert user_cache() == tmp_path / "mine"
    DiskCache().put(KEY, tensors())
    assert KEY in DiskCache(tmp_path / "mine" / "encoded")


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"

    def check(aside: Path) -> None:
        assert not path.exists()
        aside.write_text("whole")

    write_atomically(path, check)
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_key_changes_with_every_part_and_with_their_border() -> None:
    keys = [content_key(*parts) for parts in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("a", 1), ("a", 2))]
    assert len(set(keys)) == len(keys)
    assert content_key("a", "b") == keys[0]
    assert all(len(key) == 64 for key in keys)
