"""What a run was asked for: config.yaml as the run was composed, and params.json with the names and values in it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter
from yaml import YAMLError

from nai_xl.files import write_atomically
from nai_xl.record.json_file import Damaged, read_json, write_json
from nai_xl.record.run_dir import RunDirectory
from nai_xl.redact import environment_unread, without_secrets

CURE = "restore it from a copy, or remove the run's directory and train the run again"


def write_config(run_dir: Path, cfg: DictConfig) -> None:
    """Write the config with its interpolations resolved, without secrets: those that come from the environment,
    ${oc.env:NAME}, stay as they are, and *** stands for user and password of an address.
    """
    with environment_unread():
        content = without_secrets(OmegaConf.to_container(cfg, resolve=True))
    write_atomically(RunDirectory(run_dir).config, lambda path: OmegaConf.save(OmegaConf.create(content), path))


def read_config(run_dir: Path) -> DictConfig | None:
    """The run's config; None where there is none. Its targets may have moved since. A variable of the environment that
    is not set stands there by its name. Raises Damaged.
    """
    path = RunDirectory(run_dir).config
    try:
        written = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        cfg = OmegaConf.load(io.StringIO(written.decode()))
        content: Any = OmegaConf.to_container(cfg)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:  # OSError: a single value
        raise Damaged(path, error, CURE) from error
    if not isinstance(cfg, DictConfig) or all(value is None for value in content.values()):
        raise Damaged(path, "it holds no settings", CURE)
    return OmegaConf.create(_named(content))


def _named(value: Any) -> Any:
    """The value with ${oc.env:NAME} as plain text where there is no such variable."""
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{oc\.env:(\w+)\}", lambda found: found[0] if found[1] in os.environ else "\\" + found[0], value)


@dataclass(frozen=True)
class Params:
    """The content of params.json: group -> option and 'optimizer.lr' -> value, and tags such as the commit."""

    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


_PARAMS = TypeAdapter(Params)


def write_params(run_dir: Path, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
    write_json(RunDirectory(run_dir).params, without_secrets({"params": params, "tags": tags}))


def read_params(run_dir: Path) -> Params:
    """The run's params and tags; empty where there are none. Raises Damaged."""
    return read_json(RunDirectory(run_dir).params, _PARAMS, CURE) or Params()
