"""Composing: the config that overrides give, and those of every point of a grid."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict, read_write

from hydra_plugins.nai_xl_sweep import as_overrides, listed
from nai_xl.config.groups import chosen, conf_dir
from nai_xl.config.legacy_commands import understood
from nai_xl.config.schema import unknown_settings
from nai_xl.errors import UserError

Swept = dict[str, str]  # the keys given several values -> this combination's values


def compose(overrides: Sequence[str], config_name: str = "train") -> DictConfig:
    """The config that these overrides give, for use outside a command line."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose(config_name, understood(overrides))


def further(config_dir: Path) -> str:
    """The override that adds a folder of config groups, as --config-dir does on a command line."""
    return f"hydra.searchpath=['file://{config_dir.absolute()}']"


def opened(composed: DictConfig) -> tuple[DictConfig, dict[str, str], list[str]]:
    """A config composed together with its `hydra` node: without that, its choices, and the overrides that gave it."""
    cfg = composed.copy()
    with read_write(cfg), open_dict(cfg):
        hydra_node = cfg.pop("hydra")
    return cfg, chosen(cfg, hydra_node), list(hydra_node.overrides.task)


def combinations(
    overrides: Sequence[str],
    config_dir: Path | None = None,
    config_name: str = "train",
    first_of: Collection[str] = (),
) -> Iterator[tuple[Swept, dict[str, str], DictConfig]]:
    """Swept values, choices and config of every combination that a sweep over these overrides has.

    Values are split as `--multirun` splits them: 'a=x,y', 'a=range(1,4)' and 'a=glob(*)' are sweeps, 'a=[x,y]' is not.
    An experiment's own sweep is part of it, less the keys that are overridden, and so are the arms that it lists, each
    with a value for every key, "" where it has none. `config_dir`: further config groups. first_of: keys that keep the
    first of their values alone. Raises UserError for settings that do not exist.
    """
    overrides = understood(overrides)
    extra = [] if config_dir is None else [further(config_dir)]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        compose_all = functools.partial(hydra.compose, config_name, return_hydra_config=True)
        grid = _grid(overrides, first_of)
        points = list(_points(grid))
        first = compose_all([*extra, *points[0][1]])
        own = [f"{key}={value}" for key, value in (first.hydra.sweeper.params or {}).items() if key not in grid]
        arms = listed(first.sweep.arms, OverridesParser.create().parse_overrides(list(overrides)))
        keys = dict.fromkeys(key for arm in arms for key in arm)
        if own or arms:
            rest = {key: values for key, values in (_grid(own, first_of) | grid).items() if key.lstrip("+") not in keys}
            points = [
                ({**{key: arm.get(key, "") for key in keys}, **swept}, [*point, *as_overrides(arm)])
                for arm in arms or [{}]
                for swept, point in _points(rest)
            ]
        for number, (swept, point) in enumerate(points):
            cfg = first if number == 0 and not own and not arms else compose_all([*extra, *point])
            cfg, choices, _ = opened(cfg)
            if unknown := list(unknown_settings(cfg, choices)):
                raise UserError("\n".join(unknown))
            yield swept, choices, cfg


def _grid(overrides: Sequence[str], first_of: Collection[str]) -> dict[str, list[tuple[str, str]]]:
    """key -> its (value, override) pairs, several where it is swept."""
    grid: dict[str, list[tuple[str, str]]] = {}
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    for override in parser.parse_overrides(list(overrides)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            grid[key] = [("", str(override.input_line))]
        elif override.is_discrete_sweep():
            values = [(value, f"{key}={value}") for value in override.sweep_string_iterator()]
            grid[key] = values[:1] if key.lstrip("+") in first_of else values
        else:
            raise UserError(f"{override.input_line}: an interval has no end of values; list some: {key}=a,b")
    return grid


def _points(grid: dict[str, list[tuple[str, str]]]) -> Iterator[tuple[Swept, list[str]]]:
    """Swept values and overrides of every point."""
    for point in itertools.product(*grid.values()):
        here = dict(zip(grid, point, strict=True))
        swept = {key.lstrip("+"): here[key][0] for key in grid if len(grid[key]) > 1}
        yield swept, [override for _, override in point]
