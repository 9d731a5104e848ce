"""What a tracker does for a sweep as a whole, besides following each of its arms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class SweepTracker:
    """Does nothing: for trackers that know only single runs, and the base of the others."""

    def begin(
        self, sweep: str, question: str, keys: Sequence[str], metrics: Sequence[str], *, shared: Sequence[str] = ()
    ) -> list[str]:
        """Called before the arms of `sweep` start. `keys` are varied, `metrics` are compared, and `shared` are those of
        the keys that every arm has, whatever the value. Returns lines that tell a person where to watch.
        """
        return []

    def end(self, run_dirs: Sequence[Path]) -> list[str]:
        """Called after the arms in `run_dirs` have ended. Returns lines that tell a person where to look."""
        return []
