"""Files that are whole or not there, after a power cut too, and the place for those that belong to a user."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from nai_xl.errors import UserError, one_line

ASIDE = re.compile(r"\..+\.[0-9a-f]{12}")  # the names that write_atomically gives to what is not whole yet
UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)  # of file systems that cannot do it to a folder


def user_cache() -> Path:
    """$NAI_XL_CACHE, or the user's cache directory of this platform."""
    return Path(os.environ.get("NAI_XL_CACHE") or platformdirs.user_cache_dir("nai_xl", appauthor=False))


def sync(path: Path) -> None:
    """Return when the file, or the names in the folder, are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSYNCED:
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Return when everything in `folder`, and its own names, are on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_atomically(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Call `write(temporary path)` beside `path`, then rename: readers see the whole file or none.

    durable: the same holds after a power cut. Without it, the file may then be empty, and its reader must notice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")  # other hosts may share the folder
    try:
        write(aside)
        if durable:
            sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def replace_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Call `write(temporary path)` beside `path`, then put the folder in its place: an old one stays until then."""
    aside = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside)
        sync_tree(aside)
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # after an error: it may be what fills the disk
    sync(path.parent)
    return path


def remove_strays(folder: Path) -> None:
    """Remove what a killed writer left in `folder` itself. The caller is the only writer of its files."""
    for path in folder.glob(".*"):
        if ASIDE.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, kinds: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """An error of these kinds becomes a UserError that names `path` and the cure."""
    try:
        yield
    except kinds as error:
        raise UserError(
            f"cannot write {path} ({one_line(error)}). Free space, or mend what is named here, and run the same "
            "command again: it goes on from the last checkpoint"
        ) from error
