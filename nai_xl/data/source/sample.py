"""data=sample: small captioned pictures cut out of photographs, for a first run without any data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nai_xl.data.index import Index
from nai_xl.data.source import Share
from nai_xl.data.source.folder import FolderSource
from nai_xl.data.source.photographs import write_sample
from nai_xl.files import user_cache


@dataclass(frozen=True)
class SampleSource:
    """Photographs and colour cards with captions, written once into `cache` (default: the user's cache directory)."""

    without_effect: ClassVar[tuple[str, ...]] = ("cache",)  # on the trained weights

    cache: Path | None = None
    held_out: Share = 0.0

    def scan(self) -> Index:
        return FolderSource(write_sample((self.cache or user_cache()) / "sample"), held_out=self.held_out).scan()
