"""The config of a finished run, as far as painting needs it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.errors import UserError

NEEDED = ["plugins", "native", "schedule", "parameterization", "sampling", "text", "precision"]


def read_config(run: Path) -> DictConfig:
    """The config that `run` was trained with. Raises UserError when `run` is no run or does not fit this package."""
    try:
        cfg = config.stored_config(run)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{run}: no run here (no config.yaml); give a folder that nai_xl.train has made") from error
    if lacking := [key for key in NEEDED if key not in cfg]:
        raise UserError(f"{run / 'config.yaml'} lacks {', '.join(lacking)}; give a folder that nai_xl.train has made")
    config.check(OmegaConf.masked_copy(cfg, NEEDED))
    return cfg
