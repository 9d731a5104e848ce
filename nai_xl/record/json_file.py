"""Small JSON files of a run directory, which are written whole: one way to write them, and one to read them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from nai_xl.errors import UserError
from nai_xl.files import write_atomically

T = TypeVar("T")


class Damaged(UserError):
    """A file of a run directory that cannot be read. The message names the file and the cure."""

    def __init__(self, path: Path, reason: object, cure: str):
        super().__init__(f"{path} is damaged ({' '.join(str(reason).split())}); {cure}")


def keep_aside(path: Path, what: str) -> None:
    """Copy a damaged file that is about to be replaced to <file>.damaged, and say so. what: what becomes of it."""
    aside = path.with_name(f"{path.name}.damaged")
    with suppress(FileNotFoundError):
        shutil.copyfile(path, aside)
        print(f"{path} is damaged; {what}, and a copy is in {aside.name}", file=sys.stderr)


def write_json(path: Path, content: Any) -> None:
    """Readers see the file before or after, never a part. What JSON does not know is written as its str()."""
    write_atomically(path, lambda aside: aside.write_bytes(_text(content)))


def overwrite_json(path: Path, content: Any) -> None:
    """Write over the file that is there, where a full disk has no room for a second one beside it.

    Raises OSError where the blocks that the file has do not suffice.
    """
    text = _text(content)
    with path.open("r+b") as file:
        if len(text) > os.fstat(file.fileno()).st_blocks * 512:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.write(text)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=2, default=str) + "\n").encode()


def read_json(path: Path, content: TypeAdapter[T], cure: str) -> T | None:
    """The file's content; None where there is no file. Raises Damaged, with this cure, for other than `content`."""
    try:
        return content.validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise Damaged(path, place + first["msg"], cure) from error
