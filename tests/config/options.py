"""What tests of several modules need: every option of the package, and how to choose it."""

import functools
import itertools

from omegaconf import DictConfig

from nai_xl import config

OPTIONS = [(path.parent.name, path.stem) for path in sorted(config.conf_dir().glob("*/*.yaml"))]
NEEDED = {
    ("model", "sdxl"): ["model.path=x"],
    ("data", "folder"): ["data.dir=."],
    ("data", "shards"): ["data.files=x"],
    ("data", "table"): ["data.files=x"],
    ("data", "datasets"): ["data.dir=x"],
    ("data", "mix"): ["+data@data.sources.x=sample"],
    ("recipe", "sdxl_nai_v3"): ["model.path=x", "data.dir=."],
}
PRESETS = ("debug", "experiment", "hardware", "recipe", "model")  # they set more than their own group
MULTIPLE = ("memory", "evals", "hooks")


def chosen(group: str, option: str) -> list[str]:
    value = f"[{option}]" if group in MULTIPLE else option
    return [f"{group}={value}", *NEEDED.get((group, option), [])]


def together() -> list[DictConfig]:
    """A few configs that have every option between them: an option of each group at a time, and presets alone."""
    alone = [[one] for one in OPTIONS if one[0] in PRESETS]
    plain = itertools.groupby((one for one in OPTIONS if one[0] not in PRESETS), key=lambda one: one[0])
    rows = itertools.zip_longest(*(list(options) for _, options in plain))
    points = [*alone, *([one for one in row if one] for row in rows)]
    return [composed(*dict.fromkeys(word for one in point for word in chosen(*one))) for point in points]


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """The config of these overrides, shared between tests, which leave it as it is: composing takes a third second."""
    return config.compose(overrides)
