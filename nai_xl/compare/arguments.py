"""The command line of python -m nai_xl.compare."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nai_xl.compare.judging.verdicts import parse_margin
from nai_xl.errors import UserError, keyed

SOURCES = ("experiment", "sweep", "runs")
SETTINGS = (*SOURCES, "output_dir", "baseline", "metrics", "equivalence", "detect", "uri", "plugins")
SIZES = ("equivalence", "detect")


@dataclass(frozen=True)
class Request:
    """What the user asked for: settings with one of SOURCES among them, or run directories instead of a source."""

    settings: Mapping[str, str]
    directories: Sequence[Path] = ()
    config_dir: Path | None = None

    @property
    def of_sweep(self) -> bool:
        """Whether all runs of one sweep are meant, and not a selection of runs."""
        return not self.directories and "runs" not in self.settings


def arguments(argv: Sequence[str], description: str) -> Request:
    """Raises UserError for an unknown setting, and unless exactly one source of runs is named."""
    parser = argparse.ArgumentParser(prog="python -m nai_xl.compare", description=description)
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="a further folder of config groups")
    parser.add_argument("what", nargs="*", help="experiment=NAME, sweep=NAME, runs='FILTER', or run directories")
    given = parser.parse_intermixed_args(argv)
    settings: dict[str, str] = {}
    directories = []
    for word in given.what:
        key, equals, value = word.partition("=")
        if equals and not Path(word).exists():
            if key not in SETTINGS:
                raise UserError(f"no setting '{key}' of nai_xl.compare; there is {', '.join(SETTINGS)}")
            if key in SIZES:
                with keyed(key):
                    parse_margin(value)
            settings[key] = value
        else:
            directories.append(Path(word))
    if sum(key in settings for key in SOURCES) + bool(directories) != 1:
        raise UserError("say what to compare: experiment=NAME, sweep=NAME, runs='MLFLOW FILTER' or run directories")
    return Request(settings, directories, given.config_dir)
