"""A finished run as a comparison sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nai_xl.record.items import read_items

Curve = Mapping[int, float]  # step -> value


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    `arm`: the values of the swept keys, without the seed. `config`: 'loss' -> minsnr, if the choice is known, and
    'optimizer.lr' -> 1e-3. `place`: among the runs of its sweep, in the order that they were typed in; None if that is
    not known.
    """

    name: str
    arm: Mapping[str, str]
    seed: int
    status: str = "FINISHED"
    error: str = ""
    seconds: float | None = None
    steps: int | None = None
    images: int | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    place: int | None = None

    @property
    def label(self) -> str:
        """'schedule=ztsnr, parameterization=v'."""
        return ", ".join(f"{key}={value}" for key, value in self.arm.items()) or self.name

    @property
    def failed(self) -> bool:
        return self.status == "FAILED"

    @cached_property
    def images_per_step(self) -> float | None:
        """None if it is not known: arm.json counts images only once the run has ended."""
        return self.images / self.steps if self.images and self.steps else None

    def items(self, metric: str) -> dict[int, dict[str, float]]:
        """step -> item -> value; empty if the metric has no items, or they are not on this machine."""
        return {} if self.path is None else read_items(self.path, metric)
