"""Small JSON files of a run directory, which are written whole: one way to write them, and one to read them."""

from __future__ import annotations

import json
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
    text = json.dumps(content, indent=2, default=str)
    write_atomically(path, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))


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
