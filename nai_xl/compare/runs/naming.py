"""Names for arms: the settings that runs differ in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nai_xl.compare.runs.run import Run

NOT_OF_THE_METHOD = (
    "run.seed",
    "name",
    "output_dir",
    "sweep.",
    "tracker.",
    "hydra.",
    "debug",  # what the options of these four groups set stands in the config beside the choice
    "experiment",
    "hardware",
    "recipe",
)  # settings that say nothing about what an arm is


def named_by_differences(runs: Sequence[Run], ignored: tuple[str, ...]) -> list[Run]:
    """Runs outside of any sweep as arms, each named by the settings in which these runs differ.

    Settings that begin with one of `ignored`, repeat the seed, or follow from the choice of their group name no arm:
    runs that differ in them alone are one arm.
    """
    seeds = [run.seed for run in runs]
    keys = [key for key in different_keys([run.config for run in runs]) if not key.startswith(ignored)]
    keys = [key for key in keys if [run.config.get(key) for run in runs] != seeds]
    keys = [key for key in keys if not _follows(key, key.split(".")[0], keys, runs)]
    return [replace(run, arm={key: word(run.config.get(key)) for key in keys}) for run in runs]


def _follows(key: str, group: str, keys: Sequence[str], runs: Sequence[Run]) -> bool:
    """Whether `group` is among `keys`, and its choice determines the value of `key` in all of these runs."""
    pairs = {(word(run.config.get(group)), word(run.config.get(key))) for run in runs}
    return group != key and group in keys and len(pairs) == len({choice for choice, _ in pairs})


def different_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all of these flat configs, in their order."""
    every = dict.fromkeys(key for config in configs for key in config)
    return [key for key in every if len({word(config.get(key)) for config in configs}) > 1]


def varied_only(runs: Sequence[Run]) -> list[Run]:
    """Runs whose arms name only the keys that are not the same in all of them."""
    keys = different_keys([run.arm for run in runs])
    return [replace(run, arm={key: word(run.arm.get(key)) for key in keys}) for run in runs]


def word(value: object) -> str:
    """A config value as one types it in an override."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(word, value))}]"
    return str(value)
