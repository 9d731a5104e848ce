"""The config groups: folders of yaml files, the package's own and those that a user adds to Hydra's search path."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


def conf_dir() -> Path:
    """The package's own groups: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def groups(*further: Path) -> list[str]:
    """Every group of conf_dir() and of these further folders, in alphabetical order."""
    folders = (folder for folder in (conf_dir(), *further) if folder.is_dir())
    return sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})


@functools.cache
def of_several() -> tuple[str, ...]:
    """The groups of which several options are chosen at once: train.yaml lists their defaults in brackets."""
    entries = [entry for entry in _train_yaml().defaults if isinstance(entry, DictConfig)]
    return tuple(str(group) for entry in entries for group in entry if OmegaConf.is_list(entry[group]))


@functools.cache
def settings() -> tuple[str, ...]:
    """What may stand at the top of a config beside groups."""
    own = (str(key) for key in _train_yaml() if key not in ("defaults", "hydra"))
    return (*own, "native")  # which every option of `model` brings


def options(group: str) -> list[str]:
    """The package's options of a group, in alphabetical order."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def chosen(cfg: DictConfig, hydra: Any) -> dict[str, str]:
    """group -> option, in the order of train.yaml; several options of one group are joined by commas.

    `hydra` is the config's node of that name, which knows the choices and the search path.
    """
    choices: Mapping[str, Any] = hydra.runtime.choices
    known = groups(*_folders(hydra.runtime.config_sources))
    named: dict[str, Any] = {}
    for group in (key for key in dict.fromkeys([*map(str, cfg), *reversed([*choices])]) if key in known):
        option = choices.get(group)
        several = option is None and isinstance(cfg.get(group), DictConfig) and "_target_" not in cfg[group]
        named[group] = ", ".join(str(key) for key in cfg[group] if _is_built(cfg[group], key)) if several else option
    return {group: str(option) for group, option in named.items() if option}


def _is_built(node: DictConfig, key: Any) -> bool:
    """Whether an option stands there, and not only settings for one that is not chosen."""
    option = node.get(key)
    return isinstance(option, DictConfig) and "_target_" in option


def _folders(sources: Iterable[Any]) -> Iterable[Path]:
    """The entries of Hydra's search path that are folders or packages."""
    for source in sources:
        if source.schema == "file":
            yield Path(source.path)
        elif source.schema == "pkg":
            with suppress(ModuleNotFoundError):  # Hydra warns of it
                yield Path(str(importlib.resources.files(source.path.replace("/", "."))))


@functools.cache
def _train_yaml() -> DictConfig:
    loaded = OmegaConf.load(conf_dir() / "train.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded
