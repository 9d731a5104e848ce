"""What a difference means in a word, and which direction of a metric is better."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.compare.paired import LEVEL
from nai_xl.engine.meter import Meter
from nai_xl.errors import UserError
from nai_xl.interfaces import Direction

Directions = Mapping[str, Direction]  # the beginning of a metric's name -> which values are better

NO_DIFFERENCE, ONE_SEED = "no difference shown", "one seed only"
FAILED, NOT_MEASURED, NO_PAIRS = "failed", "not measured", "no pairs"


def verdict(metric: str, difference: float, p: float | None, directions: Directions | None = None) -> str:
    """The verdict on a difference with the adjusted `p`, which is None for a single seed.

    A metric without a good direction is "higher" or "lower" instead of "better" or "worse".
    """
    if p is None:
        return ONE_SEED
    if p >= LEVEL or difference == 0:
        return NO_DIFFERENCE
    side = "lower" if difference < 0 else "higher"
    good = better_direction(metric, directions)
    return side if good is None else "better" if side == good else "worse"


def better_direction(metric: str, directions: Directions | None = None) -> Direction | None:
    """The direction declared for the longest beginning of the metric's name; None if there is none.

    `directions`: those of `declared`; without them, those of the evaluators in conf/evals and of the meter.
    """
    directions = _built_in() if directions is None else directions
    known = [prefix for prefix in directions if metric.startswith(prefix)]
    return directions[max(known, key=len)] if known else None


def declared(configs: Iterable[DictConfig]) -> Directions:
    """The directions that the evaluators of these runs declare, added to those of the project's own evaluators.

    Nothing is built. An evaluator that is not installed here, or declares nothing, adds nothing. Raises UserError for a
    direction that is neither "lower" nor "higher".
    """
    found = dict(_built_in())
    for cfg in configs:
        plugins = tuple(cfg.get("plugins") or ())
        for node in (cfg.get("evals") or {}).values():
            found |= _of_target(str(node.get("_target_", "")), plugins)
    return found


@functools.cache
def _built_in() -> Directions:
    found = dict(Meter.better)
    for path in sorted(Path(config.conf_dir(), "evals").glob("*.yaml")):
        found |= _of_target(str(OmegaConf.select(OmegaConf.load(path), f"{path.stem}._target_")), ())
    return found


def _of_target(target: str, plugins: tuple[str, ...]) -> Directions:
    try:
        better: Directions = config.locate(target, plugins).better  # type: ignore[attr-defined]
    except (UserError, AttributeError):  # not installed; a function, or a class of before `better`
        return {}
    for metric, direction in better.items():
        if direction not in get_args(Direction):
            raise UserError(f"{target}.better[{metric!r}] is {direction!r}; it must be 'lower' or 'higher'")
    return better
