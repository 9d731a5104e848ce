"""Command lines of version 0.1: understood, with a word on what to type now.

run.mixed_precision has become the group `precision`, and the presets that could stand in memory= the group `hardware`.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nai_xl.config.groups import conf_dir, options
from nai_xl.config.legacy import PRECISION
from nai_xl.errors import UserError

MIXED_PRECISION = "run.mixed_precision"


def understood(arguments: Sequence[str]) -> list[str]:
    """Overrides, or a whole command line, in the words of this version. Says on stderr, once, what it has replaced.

    Raises UserError for several presets together with memory actions: no one override says the same.
    """
    return [word for argument in arguments for word in _understood(argument)]


def now(key: str, value: Any) -> str | None:
    """What to write instead of a setting of 0.1 that is no more; None for any other key."""
    if key != MIXED_PRECISION:
        return None
    precision = PRECISION.get(str(value), "bf16")
    return f"{key} is a group of its own now: precision={precision}, or `override /precision: {precision}` in a yaml"


def preset(option: str) -> str | None:
    """What to write instead of a preset among memory actions; None for anything else."""
    return f"hardware={option}" if option in options("hardware") else None


def _understood(argument: str) -> list[str]:
    if not re.match(rf"\+{{0,2}}({re.escape(MIXED_PRECISION)}|memory)=", argument):
        return [argument]
    try:
        values = _values(argument)
    except HydraException:
        return [argument]  # Hydra tells why
    new = _hardware(argument, values) if "memory=" in argument else _precision(values)
    if new != [argument]:
        _say(f"{argument} is understood as {' '.join(new)}, which is how to write it from now on")
    return new


def _values(argument: str) -> list[Any]:
    """The value of an override, or the values of a sweep."""
    parser = OverridesParser.create()
    override = parser.parse_override(argument)
    if not override.is_discrete_sweep():
        return [override.value()]
    return [parser.parse_override(f"key={text}").value() for text in override.sweep_string_iterator()]


def _precision(values: Sequence[Any]) -> list[str]:
    return [f"precision={','.join(PRECISION.get(str(value), str(value)) for value in values)}"]


def _hardware(argument: str, values: Sequence[Any]) -> list[str]:
    chosen = [list(map(str, value)) if isinstance(value, list) else [str(value)] for value in values]
    presets = [[action for action in actions if preset(action)] for actions in chosen]
    if not any(presets):
        return [argument]
    if all(len(actions) == 1 for actions in presets) and presets == chosen:
        return [f"hardware={','.join(actions[0] for actions in presets)}"]
    if len(chosen) > 1 or len(presets[0]) > 1:
        raise UserError(
            f"{argument}: {presets[0][0] if presets[0] else 'a preset'} is an option of the group hardware now; choose "
            "one with hardware=, and memory actions with memory=[...], where they differ from the preset's"
        )
    (one,) = presets[0]
    actions = dict.fromkeys([*_actions(one), *(action for action in chosen[0] if action != one)])
    return [f"hardware={one}", f"memory=[{','.join(actions)}]"]


def _actions(hardware: str) -> list[str]:
    """The memory actions of a preset."""
    for entry in OmegaConf.load(conf_dir() / "hardware" / f"{hardware}.yaml").defaults:
        if "override /memory" in entry:
            return [str(action) for action in entry["override /memory"]]
    return []


@functools.cache
def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
