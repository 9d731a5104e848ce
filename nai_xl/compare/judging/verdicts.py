"""What a difference means in a word: which direction of a metric is better, and below which size it is none."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.compare.statistics.crossed import LEVEL
from nai_xl.engine.meter import Meter
from nai_xl.errors import UserError, keyed
from nai_xl.interfaces import Direction

Directions = Mapping[str, Direction]  # the beginning of a metric's name -> which values are better
Margins = Mapping[str, str]  # the beginning of a metric's name -> a difference below this is none: "2%" or "0.1"
Scopes = Mapping[str, Sequence[str]]  # the beginning of a metric's name -> settings over which it keeps no meaning

IDENTICAL, EQUAL, UNDECIDED = "identical", "equal", "undecided"
ONE_SEED, TWO_SEEDS, NO_VERDICT = "one seed only", "two seeds only", "no verdict"
FAILED, NOT_MEASURED, NO_PAIRS = "failed", "not measured", "no pairs"
ERRORS_WITHIN = "2%"  # the margin of a positive error that declares none


@dataclass(frozen=True)
class Claims:
    """The adjusted p of both things that can be shown about a difference; None for what cannot be asked."""

    different: float
    equal: float | None = None


def verdict(
    metric: str, difference: float, p: Claims, directions: Directions | None = None, level: float = LEVEL
) -> str:
    """What is shown about a difference at this `level`. A difference within the margin is EQUAL even if it is not 0.

    A metric without a good direction is "higher" or "lower" instead of "better" or "worse".
    """
    if p.equal is not None and p.equal < level:
        return EQUAL
    if p.different >= level or difference == 0:
        return UNDECIDED
    side = "lower" if difference < 0 else "higher"
    good = better_direction(metric, directions)
    return side if good is None else "better" if side == good else "worse"


def better_direction(metric: str, directions: Directions | None = None) -> Direction | None:
    """The direction declared for the longest beginning of the metric's name; None if there is none.

    `directions`: those of `declared`; without them, those of the evaluators in conf/evals and of the meter.
    """
    return longest(metric, _built_in("better") if directions is None else directions)


def margin_of(metric: str, margins: Margins | None = None) -> str | None:
    """The margin declared for the longest beginning of the metric's name, as better_direction has the direction."""
    return longest(metric, _built_in("equal_within") if margins is None else margins)


def longest(metric: str, declared: Mapping[str, Any]) -> Any:
    """What is declared for the longest beginning of the metric's name; None if there is none."""
    known = [prefix for prefix in declared if metric.startswith(prefix)]
    return declared[max(known, key=len)] if known else None


def parse_margin(text: str) -> tuple[float, bool]:
    """The size of a margin, and whether it is a share of the baseline, such as "2%", or in the metric's units, such as
    "0.1". Raises ValueError for anything else.
    """
    share = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if share else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{text} is no difference; write 2%, or 0.1 in the metric's units")
    return value, share


def declared(configs: Iterable[DictConfig]) -> Directions:
    """The directions that the evaluators of these runs declare, added to those of the project's own evaluators.

    Nothing is built. An evaluator that is not installed here, or declares nothing, adds nothing. Raises UserError for a
    direction that is neither "lower" nor "higher".
    """
    return _declared(configs, "better")


def declared_margins(configs: Iterable[DictConfig]) -> Margins:
    """The margins that the same evaluators declare. Raises UserError for what is no difference."""
    return _declared(configs, "equal_within")


def declared_scopes(configs: Iterable[DictConfig]) -> Scopes:
    """The settings over which their metrics keep no meaning, as the same evaluators declare them."""
    return _declared(configs, "incomparable_over")


def _declared(configs: Iterable[DictConfig], member: str) -> Mapping[str, Any]:
    found = dict(_built_in(member))
    for cfg in configs:
        found |= declared_by(cfg, member)
    return found


def declared_by(cfg: DictConfig, member: str) -> dict[str, Any]:
    """What the evaluators of one config declare."""
    found: dict[str, Any] = {}
    plugins = tuple(cfg.get("plugins") or ())
    for node in (cfg.get("evals") or {}).values():
        found |= _of_target(str(node.get("_target_", "")), plugins, member)
    return found


@functools.cache
def _built_in(member: str) -> Mapping[str, Any]:
    found = dict(getattr(Meter, member))
    for path in sorted(Path(config.conf_dir(), "evals").glob("*.yaml")):
        found |= _of_target(str(OmegaConf.select(OmegaConf.load(path), f"{path.stem}._target_")), (), member)
    return found


def _of_target(target: str, plugins: tuple[str, ...], member: str) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = getattr(config.locate(target, plugins), member)
    except (UserError, AttributeError):  # not installed; a function, or a class of before this member
        return {}
    for metric, value in found.items():
        if member == "better" and value not in get_args(Direction):
            raise UserError(f"{target}.better[{metric!r}] is {value!r}; it must be 'lower' or 'higher'")
        if member == "equal_within":
            with keyed(f"{target}.equal_within[{metric!r}]"):
                parse_margin(value)
    return found
