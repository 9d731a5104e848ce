"""The cache of encoded tensors: whole entries or none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nai_xl.data import cache as module
from nai_xl.data.cache import DiskCache, MemoryCache, content_key
from nai_xl.errors import UserError
from nai_xl.files import user_cache, write_atomically
from nai_xl.interfaces import Cache

KEY = content_key("latent", 1)


def tensors() -> dict[str, Tensor]:
    return {"latents": torch.randn(4, 3, 2), "half": torch.randn(5).half(), "view": torch.randn(6, 4).T[1:, ::2]}


def entry(cache: DiskCache) -> Path:
    (path,) = cache.root.rglob("*.safetensors")
    return path


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_entries_come_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    cache: Cache = DiskCache(tmp_path) if kind == "disk" else MemoryCache()
    assert KEY not in cache
    assert cache.get(KEY) is None
    written = tensors()
    cache.put(KEY, written)
    assert KEY in cache
    found = cache.get(KEY)
    assert found is not None
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], written[name]) and found[name].dtype == written[name].dtype for name in written)


def test_another_process_finds_what_was_written(tmp_path: Path) -> None:
    DiskCache(tmp_path).put(KEY, tensors())
    assert KEY in DiskCache(tmp_path)
    assert DiskCache.shared and not MemoryCache.shared


@pytest.mark.parametrize("left", [0.0, 0.01, 0.3, 0.99])
def test_truncated_entry_counts_as_missing_and_is_made_anew(tmp_path: Path, left: float) -> None:
    cache = DiskCache(tmp_path)
    cache.put(KEY, tensors())
    path = entry(cache)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    assert KEY not in cache
    assert cache.get(KEY) is None
    cache.put(KEY, tensors())
    assert KEY in cache


def test_garbage_counts_as_missing(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.put(KEY, tensors())
    entry(cache).write_bytes(b"\xff" * 500)
    assert KEY not in cache
    assert cache.get(KEY) is None


@pytest.mark.parametrize("damage", ["bit", "zeros", "name"])
def test_an_entry_with_other_bytes_is_found_when_it_is_read_and_gone_for_the_next_lookup(
    tmp_path: Path, damage: str
) -> None:
    cache = DiskCache(tmp_path)
    cache.put(KEY, tensors())
    path = entry(cache)
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-3] ^= 4
    elif damage == "zeros":
        content[-50:] = bytes(50)
    else:
        content = content.replace(b'"half"', b'"halt"')
    path.write_bytes(content)
    assert KEY in cache  # which looks at the length alone
    assert cache.get(KEY) is None
    assert KEY not in DiskCache(tmp_path)


def test_entries_without_a_checksum_stay_valid(tmp_path: Path) -> None:
    cache, written = DiskCache(tmp_path), {"latents": torch.randn(4, 3, 2)}
    cache.put(KEY, written)
    save_file(written, entry(cache))
    found = cache.get(KEY)
    assert KEY in cache and found is not None and torch.equal(found["latents"], written["latents"])


def test_what_lookup_calls_whole_can_be_read_so_that_encoding_again_mends_every_damage(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.put(KEY, tensors())
    path = entry(cache)
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert (KEY in cache) == (cache.get(KEY) is not None) == (length == len(whole))


def test_an_entry_that_cannot_be_read_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.put(KEY, tensors())
    path = entry(cache)
    path.unlink()
    path.mkdir()
    for look in (cache.get, cache.__contains__):
        with pytest.raises(UserError, match=r"cache\.dir=.*cannot be read.*set cache\.dir=DIR"):
            look(KEY)


def test_failing_write_leaves_no_file_and_keeps_the_old_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, before = DiskCache(tmp_path), tensors()
    cache.put(KEY, before)

    def full(path: Path, _: object) -> None:
        path.write_bytes(b"half an ent")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_checked", full)
    other = content_key("latent", 2)
    for key in (KEY, other):
        with pytest.raises(UserError, match=r"cache\.dir=.*No space left"):
            cache.put(key, tensors())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [entry(cache)]
    found = cache.get(KEY)
    assert found is not None
    assert torch.equal(found["latents"], before["latents"])
    assert other not in cache


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"

    def check(aside: Path) -> None:
        assert not path.exists()
        aside.write_text("whole")

    write_atomically(path, check)
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


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


def test_key_changes_with_every_part_and_with_their_border() -> None:
    keys = [content_key(*parts) for parts in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("a", 1), ("a", 2))]
    assert len(set(keys)) == len(keys)
    assert content_key("a", "b") == keys[0]
    assert all(len(key) == 64 for key in keys)
