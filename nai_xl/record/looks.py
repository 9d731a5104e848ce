"""looks.json beside the report on a sweep: every look that was taken at its results, in the order of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from nai_xl.record.json_file import read_json, write_json

FILE = "looks.json"


@dataclass(frozen=True)
class ArmLook:
    """What was seen of one arm: the seeds that it shares with the baseline, and the last step compared. `level`: the
    chance of a false verdict that this look may take, where `planned` says whether the plan has it.
    """

    seeds: tuple[int, ...]
    step: int | None
    planned: bool
    level: float
    numbers: str = ""  # a digest of what was compared: finished runs can be measured anew

    def same_data(self, other: ArmLook) -> bool:
        return (self.seeds, self.step, self.numbers) == (other.seeds, other.step, other.numbers)


@dataclass(frozen=True)
class Look:
    """One look at a sweep. `seeds` and `looks` are its plan: how many of each arm, and after how many it is judged.

    arms: only those that could be judged. verdicts: metric -> arm -> what was decided; the undecided are left out.
    """

    time: str
    baseline: str
    metrics: tuple[str, ...]
    seeds: int
    looks: tuple[int, ...]
    arms: Mapping[str, ArmLook]
    verdicts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def plan(self) -> tuple[int, tuple[int, ...]]:
        return self.seeds, self.looks

    def same_data(self, other: Look) -> bool:
        """Whether both looks tested the same claims on the same data."""
        if (self.baseline, self.metrics, self.arms.keys()) != (other.baseline, other.metrics, other.arms.keys()):
            return False
        return all(seen.same_data(other.arms[arm]) for arm, seen in self.arms.items())


_LOOKS = TypeAdapter(list[Look])


def read_looks(folder: Path) -> list[Look]:
    """The looks recorded in the folder of a sweep's report; none if there is no record. Raises Damaged."""
    return read_json(folder / FILE, _LOOKS, "restore it from a copy; without it, earlier looks do not count") or []


def write_looks(folder: Path, looks: Sequence[Look]) -> None:
    """Replace the record, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, [asdict(look) for look in looks])
