"""The error of x0 at log-SNR levels that all models share: comparable whatever they predict and were trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from nai_xl.evals.val_loss import LOG_SNR
from nai_xl.record.items import mean, read_items, report

PREFIX = "val/x0_loss_logsnr"
Items = Mapping[str, float]


def comparable(metric: str) -> bool:
    """Whether a metric means the same for every model: not what val_loss measures at a schedule's own timesteps."""
    return metric.startswith(PREFIX) or not metric.startswith("val/")


def shared_levels(homes: Sequence[Path], step: int) -> list[int]:
    """The levels that were measured in all of these folders."""
    return [level for level in LOG_SNR if all(_items(home, level, step) for home in homes)]


def over_levels(home: Path, levels: Sequence[int], step: int) -> dict[str, float]:
    """val/x0_loss_logsnr: each item's geometric mean over these levels, so that a change of 1 % counts the same at all
    of them; a plain mean would be the noisiest level's. Written beside the levels' own; {} without any.
    """
    tables = [_items(home, level, step) for level in levels]
    if not tables:
        return {}
    values = {item: math.exp(mean(_log(table[item]) for table in tables)) for item in tables[0]}
    return report(home, step, {PREFIX: values})


def _items(home: Path, level: int, step: int) -> Items:
    return read_items(home, f"{PREFIX}_{level}").get(step, {})


def _log(error: float) -> float:
    return -math.inf if error == 0 else math.log(error)  # nan stays nan
