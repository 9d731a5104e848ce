"""From a composed config to built objects: check, build, identity. No other room but the entry points knows Hydra."""

from nai_xl.config.build import build, completed, locate, member
from nai_xl.config.cli import SweepOfArms, entry_point, mistakes_told
from nai_xl.config.grid import Swept, combinations, compose, further, opened
from nai_xl.config.groups import conf_dir, groups
from nai_xl.config.identity import (
    arm,
    begun_with_former,
    declared,
    flat,
    kin,
    left_out,
    open_ended,
    run_dir,
    signature,
    unfinished_kin,
)
from nai_xl.config.legacy import stored_config, upgraded, upgraded_choices
from nai_xl.config.pace import pace_in
from nai_xl.config.schema import check
from nai_xl.config.trust import typed_plugins

__all__ = [
    "SweepOfArms",
    "Swept",
    "arm",
    "begun_with_former",
    "build",
    "check",
    "combinations",
    "completed",
    "compose",
    "conf_dir",
    "declared",
    "entry_point",
    "flat",
    "further",
    "groups",
    "kin",
    "left_out",
    "locate",
    "member",
    "mistakes_told",
    "open_ended",
    "opened",
    "pace_in",
    "run_dir",
    "signature",
    "stored_config",
    "typed_plugins",
    "unfinished_kin",
    "upgraded",
    "upgraded_choices",
]
