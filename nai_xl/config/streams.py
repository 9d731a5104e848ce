"""stdout and stderr that outlast their reader, and a traceback without secrets."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from nai_xl.redact import redacted


class Lasting:
    """A stream that goes on in silence once nobody reads it any more: `| head -1`, a terminal that was closed, a full
    disk. Training must not end of it.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._silence()

    def _silence(self) -> None:
        """Let what was not written, and all that follows, go to /dev/null."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def lasting(stream: TextIO | Any) -> Any:
    """The stream as one that lasts; one to /dev/null where the program was started without."""
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    return stream if isinstance(stream, Lasting) else Lasting(stream)


def tell_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that nobody expected, with *** for secrets."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
