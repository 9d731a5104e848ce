"""Library chatter that tells a user of this package nothing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers.utils.logging
import transformers.utils.logging

LIBRARIES = (diffusers.utils.logging, transformers.utils.logging)


def quiet_libraries() -> None:
    """Errors only, and no progress bars but our own."""
    for library in LIBRARIES:
        library.set_verbosity_error()
        library.disable_progress_bar()
    for name in ("accelerate", "torch.distributed", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # where it is installed, other libraries import it; it sets its level then, and says on a CPU that there is no GPU
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and only errors from the model libraries inside the block; as they were after it."""
    before: list[Any] = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in LIBRARIES]
    for library in LIBRARIES:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bars in before:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()
