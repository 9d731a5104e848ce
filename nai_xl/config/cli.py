"""Entry points: a job as a command line program, and a user's mistakes told in one line each."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nai_xl.config import legacy_commands
from nai_xl.config.build import locate
from nai_xl.config.grid import compose, further
from nai_xl.config.groups import chosen, conf_dir, groups, options, settings
from nai_xl.config.schema import check, did_you_mean
from nai_xl.config.streams import lasting, tell_unexpected
from nai_xl.distributed import launch
from nai_xl.errors import STOPPED_STATUS, Stopped, UserError, one_line
from nai_xl.redact import redacted

Job = Callable[[DictConfig, dict[str, str]], float | None]  # config, group -> choice; what a search minimises
MISTAKES = (UserError, HydraException, OmegaConfBaseException)


class SweepOfArms(Protocol):
    """How a program trains the arms of a sweep in processes of their own, and tells what became of them."""

    def launch(
        self, master: DictConfig, composed: Sequence[DictConfig], compose: Callable[[Sequence[str]], DictConfig]
    ) -> list[float | UserError | None]: ...
    def tell(self) -> None: ...


def entry_point(
    job: Job,
    config_name: str = "train",
    sweep: SweepOfArms | None = None,
    needless: Callable[[DictConfig, dict[str, str], UserError], bool] | None = None,
) -> Callable[[], None]:
    """`job` as a command line program: Hydra composes, `check` refuses mistakes with one message and exit status 1.

    `sweep` trains the arms of a --multirun, unless hydra/launcher names another launcher. Without --multirun, this
    process runs `job` itself. `needless` may find, and say, that a mistake does not matter: there is nothing to do.
    """

    failed: list[UserError] = []

    def run(cfg: DictConfig) -> float | None:
        choices = chosen(cfg, HydraConfig.get())
        try:
            check(cfg, choices=choices)
            return job(cfg, choices)
        except UserError as error:
            if needless and needless(cfg, choices, error):
                return None
            several = launch.several()
            if HydraConfig.get().mode == RunMode.MULTIRUN and not several:
                raise  # Hydra's launcher goes on with the other arms, and raises it in the end
            failed.append(error)  # told here, and not by Hydra
            _tell(error)
            if several:
                sys.exit(1)  # other ranks may not have met it: they would be in another arm than this one
            return None

    run.sweep = sweep  # type: ignore[attr-defined]  # the launcher, which gets this function, finds it there

    def main() -> None:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let exceptions through to be told below in one line
        failed.clear()
        decorated = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(run)
        mistake: Exception | None = None
        status = 0
        sys.excepthook = tell_unexpected
        sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
        try:
            refuse_bytes(sys.argv[1:])
            sys.argv[1:] = legacy_commands.understood(sys.argv[1:])  # where Hydra reads it
            decorated()
        except MISTAKES as error:
            mistake = error
        except KeyboardInterrupt as stopped:
            status = _status(stopped)
        if sweep:
            sweep.tell()
        if mistake:
            _tell(mistake)
        if status or mistake or failed:
            sys.exit(status or 1)

    return main


def refuse_bytes(arguments: Sequence[str]) -> None:
    """Raises UserError for a word that is no UTF-8: it could not be written into the run's config."""
    for word in arguments:
        if re.search(r"[\ud800-\udfff]", word):
            shown = word.encode(errors="backslashreplace").decode()
            raise UserError(f"{shown}: not UTF-8, so no config can hold it; rename what it names")


@contextmanager
def mistakes_told() -> Iterator[None]:
    """For programs that compose by themselves: a user's mistake inside the block is told and exits with status 1."""
    try:
        yield
    except MISTAKES as error:
        _tell(error)
        sys.exit(1)
    except KeyboardInterrupt as stopped:
        sys.exit(_status(stopped))


def _status(stopped: KeyboardInterrupt) -> int:
    """The exit status after a signal. Further ones that ask for the same do not end the last words."""
    if not isinstance(stopped, Stopped):
        return 130
    for number in set(launch.SIGNALS) - {signal.SIGINT}:
        signal.signal(number, signal.SIG_IGN)
    return STOPPED_STATUS


def _tell(error: Exception) -> None:
    for line in filter(str.strip, _told(error).splitlines()):
        print(f"error: {redacted(line)}", file=sys.stderr)


def _told(error: Exception) -> str:
    """Hydra's errors in words that name what to type instead."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _told_missing(error) or str(error)
    unknown = re.search(r"Could not override '([\w.]+)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        return _told_unknown_key(unknown.group(1))
    if isinstance(error, OverrideParseException):
        return f"{one_line(error)} Quote what holds spaces, commas or brackets: 'key=\"a (1), b\"'"
    return str(error)


def _told_missing(error: MissingConfigException) -> str | None:
    """Which option of a group was meant; None where it is no group."""
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    known = error.options or options(group)  # Hydra names none for a group of which several can be chosen
    if group == "memory" and (now := legacy_commands.preset(option)):
        return f"memory={option} is {now} now, or `override /hardware: {option}` in a yaml"
    return f"{group}={option}: no such option{did_you_mean(option, sorted(known))}" if group and known else None


def _told_unknown_key(path: str) -> str:
    """Which key was meant by an override of one that does not exist."""
    if now := legacy_commands.now(path, None):
        return now
    overrides = [arg for arg in sys.argv[1:] if "=" in arg and not arg.startswith(("-", f"{path}=")) and "," not in arg]
    found = re.search(r"(?:^|\0)(?:--config-dir|-cd)[\0=]([^\0]+)", "\0".join(sys.argv[1:]))
    added = [Path(found[1])] if found else []
    parent, _, key = path.rpartition(".")
    try:
        node: Any = compose([*overrides, *map(further, added)])
    except HydraException:  # another override is wrong too: suggest what the defaults know
        node = compose([])
    named = tuple(node.get("plugins") or ())
    for part in filter(None, parent.split(".")):
        node = node.get(part) if isinstance(node, DictConfig) else None
    if isinstance(node, DictConfig) and "_target_" in node:
        known = list(inspect.signature(locate(str(node._target_), named)).parameters)
        return f"{path}: no parameter '{key}' in {str(node._target_).rpartition('.')[2]}{did_you_mean(key, known)}"
    known = [str(k) for k in node] if parent and isinstance(node, DictConfig) else [*settings(), *groups(*added)]
    return f"no setting '{path}'{did_you_mean(key, known)}"
