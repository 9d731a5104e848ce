"""Content-addressed caches of tensors: on disk in shards that all runs share, or in memory for the run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from nai_xl.data.shards.catalogue import Catalogue, Found
from nai_xl.data.shards.layout import Layout
from nai_xl.data.shards.shard import FULL, KEY, OPEN, SEALED, File, Writer, adopt, bury, crc_of
from nai_xl.errors import UserError
from nai_xl.files import user_cache

FOLDER = "shards"  # in the cache's folder, beside what earlier versions have left there
STAY_OPEN = 256  # shards that are kept open for reading; a process may often have no more than 1024 files
STAY_WRITTEN = 32  # shards that are written in turn, one of each kind of entry
GB, MB = 1e9, 1e6
RESERVE = 64 << 20  # bytes left free on a disk: indexes, and what else a run writes


def content_key(*parts: object) -> str:
    """The name of what is made from `parts`: 64 hex characters that change when any of them does."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def key_bytes(key: str) -> bytes:
    """The 16 bytes of 32 hex characters; of any other key, those of its hash."""
    if len(key) == 2 * KEY:
        with suppress(ValueError):
            return bytes.fromhex(key)
    return hashlib.sha256(key.encode()).digest()[:KEY]


def in_words(size: int) -> str:
    """Bytes as '12.3 GB', or as MB where that would be less than one."""
    return f"{size / GB:,.1f} GB" if size >= GB else f"{size / MB:,.2f} MB"


class KeyByKey:
    """The methods of a cache that take many keys, by those that take one; for caches that keep nothing on a disk."""

    def missing(self, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return np.array([key.tobytes().hex() not in self for key in keys], bool)

    def refuse_too_little_room(self, needed: int, smaller: str) -> None:
        pass

    def discard(self, key: str) -> None:
        pass

    def seal(self) -> None:
        pass

    def __contains__(self, key: str) -> bool:
        raise NotImplementedError


@dataclass(frozen=True)
class DiskCache:
    """`dir`/shards/: safetensors files of about 256 MB, a row for each entry, and an index of all of them.

    Every process appends to shards of its own. A damaged entry counts as missing, so that the next look makes it anew:
    one that is cut short when it is looked for, one whose checksum is wrong when it is read. The folder may be moved,
    copied, or mounted without the right to write.

    Raises UserError if the folder cannot be made.
    """

    changes_weights: ClassVar[bool] = False
    shared = True

    dir: Path | None = None  # default: in the user's cache directory
    max_gb: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache.dir={self.root} cannot be written ({error.strerror}); set cache.dir=DIR") from error

    @cached_property
    def root(self) -> Path:
        return self.dir or user_cache() / "encoded"

    @cached_property
    def _state(self) -> _State:
        return _State(self.root / FOLDER)

    def __reduce__(self) -> tuple[type[DiskCache], tuple[Path | None, float | None]]:
        return DiskCache, (self.dir, self.max_gb)  # open files stay in their process

    # --- looking ------------------------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        with self._reading():
            return self._state.find(key_bytes(key)) is not None

    def missing(self, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """[M] of keys [M,16]."""
        with self._reading():
            mask, self._state.damaged = self._state.refreshed().missing(keys)
        return mask

    def place(self, key: str) -> str:
        with self._reading():
            found = self._state.find(key_bytes(key))
        if found is None:
            return f"entry {key[:16]} in {self.root}/"
        return f"{self.root / FOLDER / found.shard.stem}{SEALED}, row {found.row}"

    def get(self, key: str) -> dict[str, Tensor] | None:
        name = key_bytes(key)
        with self._reading():
            while (found := self._state.find(name)) is not None:
                row = self._state.read(found)
                if row is not None and crc_of(name, row) == found.crc:
                    return found.shard.layout.unpack(row)
                self._state.bury(found)
        return None

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cache.dir={self.root} cannot be read ({error.strerror}); set cache.dir=DIR") from error

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        try:
            self._state.put(key_bytes(key), tensors)
        except OSError as error:
            raise self._unwritable(error) from error

    def discard(self, key: str) -> None:
        """From now on, the entry counts as missing."""
        with self._reading():
            while (found := self._state.find(key_bytes(key))) is not None:
                self._state.bury(found)

    def seal(self) -> None:
        """Close the shards that this process writes, so that any reader of safetensors files can open them."""
        try:
            self._state.seal()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        if self._writable():
            return UserError(
                f"cache.dir={self.root}: cannot write ({error.strerror}); free space or set cache.dir=DIR, and run the "
                "same command again: what is there is kept"
            )
        return UserError(
            f"cache.dir={self.root} lacks entries that this run needs, and cannot be written ({error.strerror}); set "
            "cache.dir=DIR"
        )

    def _writable(self) -> bool:
        return os.access(self._state.folder if self._state.folder.exists() else self.root, os.W_OK)

    def refuse_too_little_room(self, needed: int, smaller: str) -> None:
        """Raise UserError if `needed` more bytes are more than the disk or max_gb has room for.

        smaller: the overrides that make entries smaller or fewer. A folder that cannot be written is not looked at.
        """
        if not self._writable():
            return
        free = shutil.disk_usage(self.root).free
        if needed > free - RESERVE:
            raise UserError(
                f"cache.dir={self.root}: {in_words(needed)} are to be encoded, and its disk has {in_words(free)} "
                f"free. Free space, or set cache.dir=DIR on another disk{smaller}"
            )
        used = self._state.bytes()
        if self.max_gb is not None and used + needed > self.max_gb * GB:
            raise UserError(
                f"cache.max_gb={self.max_gb:g}: {in_words(needed)} are to be encoded beside {in_words(used)} in "
                f"{self.root}. Raise cache.max_gb, or set cache.dir=DIR for a cache of its own{smaller}"
            )

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Inside the block nobody else in any process is, with the same name. A folder that cannot be written has no
        need of it: a put there raises UserError.
        """
        with ExitStack() as stack:
            if self._writable():
                try:
                    self._state.folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(self._locked(self._state.folder / f".{name}.lock"))
                    adopt(self._state.folder)
                except OSError as error:
                    raise self._unwritable(error) from error
                self._tell()
            yield
            if self._writable():
                self.seal()
                try:
                    self._state.refreshed().merge()
                except OSError as error:
                    raise self._unwritable(error) from error

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        try:
            file = File(path, os.O_RDWR | os.O_CREAT)
        except PermissionError:  # another user's
            file = File(path, os.O_RDONLY)
        try:
            fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that encodes into {self.root}", file=sys.stderr)
            fcntl.flock(file.number, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file.number, fcntl.LOCK_UN)

    def _tell(self) -> None:
        """Say what was found damaged, and what an earlier version has left."""
        if number := self._state.damaged:
            entries = f"{number} damaged {'entry' if number == 1 else 'entries'}"
            print(f"cache.dir={self.root}: {entries} made anew", file=sys.stderr)
            self._state.damaged = 0
        old = [path for path in self.root.iterdir() if re.fullmatch("[0-9a-f]{2}", path.name)]
        if old and not self._state.told:
            self._state.told = True
            about = len(old) * sum(1 for _ in old[0].iterdir())
            print(
                f"cache.dir={self.root}: about {about:,} files of an earlier version are not read any more; to delete "
                f"them: rm -r {self.root}/[0-9a-f][0-9a-f]",
                file=sys.stderr,
            )


class _State:
    """What a process knows of a folder of shards, and has open in it. One thread writes at a time; any may read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.catalogue: Catalogue | None = None
        self.lost: set[tuple[str, int]] = set()  # damaged rows that could not be noted in the folder
        self.damaged = 0  # entries, not yet spoken of
        self.told = False  # of an earlier version's files
        self.writers: OrderedDict[Layout, Writer] = OrderedDict()
        self.writing = threading.Lock()
        self.files: dict[str, File] = {}  # open for reading

    def refreshed(self) -> Catalogue:
        """The folder as it is now."""
        self.catalogue = Catalogue.read(self.folder, self.catalogue)
        if self.lost:
            places = {shard.stem: number for number, shard in enumerate(self.catalogue.shards)}
            self.catalogue.dead |= {places[stem] << 32 | row for stem, row in self.lost if stem in places}
        return self.catalogue

    def find(self, key: bytes) -> Found | None:
        """Looks into the folder only for what is not known yet."""
        found = self.catalogue.find(key) if self.catalogue else None
        return found or self.refreshed().find(key)

    def read(self, found: Found) -> NDArray[np.uint8] | None:
        """One row; None if it is not there in full."""
        layout = found.shard.layout
        row = np.empty(layout.stride, np.uint8)
        file = self._open(found.shard.stem)
        if file is None:
            return None
        read = os.preadv(file.number, [row.data], layout.base + found.row * layout.stride)
        return row if read == len(row) else None

    def _open(self, stem: str) -> File | None:
        file = self.files.get(stem) or self._opened(stem)
        if file is not None and STAY_OPEN:
            self.files[stem] = file
            while len(self.files) > STAY_OPEN:
                with suppress(KeyError):  # another thread was faster
                    del self.files[next(iter(self.files))]
        return file

    def _opened(self, stem: str) -> File | None:
        for ending in (SEALED, OPEN, SEALED):  # it may be sealed meanwhile
            with suppress(FileNotFoundError):
                return File(self.folder / f"{stem}{ending}", os.O_RDONLY)
        return None

    def bury(self, found: Found) -> None:
        """The entry is not to be read again, by this process and, if that can be noted, by any other."""
        assert self.catalogue is not None
        number = next(n for n, shard in enumerate(self.catalogue.shards) if shard.stem == found.shard.stem)
        self.catalogue.dead.add(number << 32 | found.row)
        try:
            bury(self.folder, found.shard.stem, np.array([found.row], np.uint32))
        except OSError:
            self.lost.add((found.shard.stem, found.row))

    def put(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        with self.writing:
            before = self.catalogue.find(key) if self.catalogue else None
            layout = Layout.of(tensors)
            self._writer(layout).append(key, layout.pack(tensors))
            if before is not None:
                self.bury(before)

    def _writer(self, layout: Layout) -> Writer:
        writer = self.writers.pop(layout, None)
        if writer is not None and writer.full:
            writer.seal()
            writer = None
        if writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            writer = self._resumed(layout) or Writer.new(self.folder, layout)
        self.writers[layout] = writer
        while len(self.writers) > STAY_WRITTEN:
            self.writers.popitem(last=False)[1].seal()
        return writer

    def _resumed(self, layout: Layout) -> Writer | None:
        """A shard that is not full and that nobody writes."""
        for shard in self.refreshed().shards:
            if shard.layout == layout and shard.rows * layout.stride < FULL:
                with suppress(PermissionError):  # another user's
                    if (writer := Writer.resume(self.folder, shard.stem)) is not None:
                        return writer
        return None

    def seal(self) -> None:
        with self.writing:
            while self.writers:
                self.writers.popitem()[1].seal()

    def bytes(self) -> int:
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            return sum(entry.stat().st_size for entry in entries)
        return 0


@dataclass(frozen=True)
class MemoryCache(KeyByKey):
    """Keeps everything in this process; every run, and every rank, makes its own."""

    changes_weights: ClassVar[bool] = False
    shared = False

    entries: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False)

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def place(self, key: str) -> str:
        return f"entry {key[:16]} in memory"

    def get(self, key: str) -> dict[str, Tensor] | None:
        return self.entries.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self.entries[key] = dict(tensors)

    def discard(self, key: str) -> None:
        self.entries.pop(key, None)

    def alone(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()
