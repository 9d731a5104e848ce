"""What tests of several modules need: every option of the package, and how to choose it."""

import functools

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
MULTIPLE = ("memory", "evals", "hooks")


def chosen(group: str, option: str) -> list[str]:
    value = f"[{option}]" if group in MULTIPLE else option
    return [f"{group}={value}", *NEEDED.get((group, option), [])]


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """The config of these overrides, shared between tests, which leave it as it is: composing takes a third second."""
    return config.compose(overrides)
