"""Files that are whole or not there, and the place for those that belong to a user and not to a run."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs


def user_cache() -> Path:
    """$NAI_XL_CACHE, or the user's cache directory of this platform."""
    return Path(os.environ.get("NAI_XL_CACHE") or platformdirs.user_cache_dir("nai_xl", appauthor=False))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)` beside `path`, then rename: readers see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")  # other hosts may share the folder
    try:
        write(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def replace_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Call `write(temporary path)` beside `path`, then put the folder in its place: an old one stays until then."""
    aside = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    write(aside)
    shutil.rmtree(path, ignore_errors=True)
    return aside.rename(path)
