"""What is wrong with the entries of a cache that a run would read: all of them are read, and none is made."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from nai_xl.interfaces import Cache


@dataclass
class Audit:
    """Stands in for `cache` while a run gets ready: whatever is asked for is looked at, and said to be there.

    faults: where a damaged entry lies -> what is wrong with it. Such an entry is discarded.
    """

    cache: Cache
    read: int = 0
    absent: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    asked: set[bytes] = field(default_factory=set, repr=False)

    @property
    def shared(self) -> bool:
        return self.cache.shared

    def missing(self, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        asked = hashlib.sha256(keys.tobytes()).digest()
        if asked not in self.asked:
            self.asked.add(asked)
            for key in tqdm(keys, desc="reading the cache", unit=" entries"):
                self._look(key.tobytes().hex())
        return np.zeros(len(keys), bool)

    def _look(self, key: str) -> None:
        if key not in self.cache:
            self.absent += 1
            return
        self.read += 1
        place, tensors = self.cache.place(key), self.cache.get(key)
        if tensors is None:
            self.faults[place] = "wrong checksum"
        elif not all(tensor.isfinite().all() for tensor in tensors.values()):
            self.faults[place] = "not finite"
            self.cache.discard(key)

    def by_file(self) -> list[str]:
        """'FILE: row 3 (wrong checksum), row 7 (not finite)'."""
        files = defaultdict(list)
        for place, why in self.faults.items():
            file, _, row = place.rpartition(", ")
            files[file].append(f"{row} ({why})")
        return [f"{file}: {', '.join(rows)}" for file, rows in sorted(files.items())]

    # --- as the cache does it -----------------------------------------------------------------------------------------

    def __contains__(self, key: str) -> bool:
        return key in self.cache

    def place(self, key: str) -> str:
        return self.cache.place(key)

    def get(self, key: str) -> dict[str, Tensor] | None:
        return self.cache.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        raise AssertionError("nothing is missing, so nothing is made")

    def discard(self, key: str) -> None:
        self.cache.discard(key)

    def seal(self) -> None:
        pass

    def refuse_too_little_room(self, needed: int, smaller: str) -> None:
        pass

    def alone(self, name: str) -> AbstractContextManager[None]:
        return self.cache.alone(name)
