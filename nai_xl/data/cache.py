"""Content-addressed caches of tensors: on disk as one safetensors file a key, or in memory for the run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from filelock import FileLock, Timeout
from torch import Tensor

from nai_xl.data.tensor_file import is_whole, read_tensors, write_checked
from nai_xl.errors import UserError
from nai_xl.files import user_cache, write_atomically


def content_key(*parts: object) -> str:
    """The name of what is made from `parts`: 64 hex characters that change when any of them does."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


@dataclass(frozen=True)
class DiskCache:
    """`dir`/ab/abcd....safetensors. A damaged file counts as missing, so that the next look makes it anew: one that is
    cut short when it is looked for, one whose checksum is wrong when it is read.
    """

    changes_weights: ClassVar[bool] = False

    dir: Path | None = None  # default: in the user's cache directory
    damaged: set[str] = field(default_factory=set, init=False, repr=False, compare=False)  # keys, not yet spoken of
    shared = True

    @cached_property
    def root(self) -> Path:
        return self.dir or user_cache() / "encoded"

    def __post_init__(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache.dir={self.root} cannot be written ({error.strerror}); set cache.dir=DIR") from error

    def _file(self, key: str) -> str:
        return f"{self.root}/{key[:2]}/{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        try:
            whole = is_whole(self._file(key))
            if not whole:
                self.damaged.add(key)
            return whole
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unreadable(error) from error

    def place(self, key: str) -> str:
        return self._file(key)

    def get(self, key: str) -> dict[str, Tensor] | None:
        try:
            tensors = read_tensors(self._file(key))
            if tensors is None:
                self.damaged.add(key)
                self._remove_if_damaged(key)
            return tensors
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(error) from error

    def _remove_if_damaged(self, key: str) -> None:
        """Its length would make it look whole at the next start. Another process may have made it anew by now."""
        with suppress(OSError):
            if read_tensors(self._file(key)) is None:
                Path(self._file(key)).unlink()

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"cache.dir={self.root} cannot be read ({error.strerror}); set cache.dir=DIR")

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        try:
            # no wait for the disk: after a power cut, the checksum tells
            write_atomically(Path(self._file(key)), lambda path: write_checked(path, tensors), durable=False)
        except OSError as error:
            raise UserError(
                f"cache.dir={self.root}: cannot write ({error}); free space or set cache.dir=DIR"
            ) from error

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        if self.damaged:
            entries = f"{len(self.damaged)} damaged {'entry' if len(self.damaged) == 1 else 'entries'}"
            print(f"cache.dir={self.root}: {entries} made anew", file=sys.stderr)
            self.damaged.clear()
        lock = FileLock(str(self.root / f".{name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another run that encodes into {self.root}", file=sys.stderr)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


@dataclass(frozen=True)
class MemoryCache:
    """Keeps everything in this process; every run, and every rank, makes its own."""

    changes_weights: ClassVar[bool] = False

    entries: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False)
    shared = False

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def place(self, key: str) -> str:
        return f"entry {key[:16]} in memory"

    def get(self, key: str) -> dict[str, Tensor] | None:
        return self.entries.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self.entries[key] = dict(tensors)

    def alone(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()
