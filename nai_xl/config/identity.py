"""What a run is: everything of its config that can change the trained weights, wherever the code for it lies.

The signature hashes, for every group, the option's public name and the values that differ from the defaults of its
function or class. Moving a file, adding a parameter with a default, stating a default: none of them changes it. What
cannot change the weights is left out. Options say so themselves, where they are defined: nai_xl.interfaces.declare.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from nai_xl.config import legacy
from nai_xl.config.build import coerced, holds_target, locate, plain
from nai_xl.config.groups import conf_dir, of_several
from nai_xl.config.pace import as_one_process, misplaced, pace_in
from nai_xl.distributed.launch import world_size
from nai_xl.errors import UserError
from nai_xl.record.arm import Arm, read_arm
from nai_xl.record.pace import Pace, pace_of
from nai_xl.redact import environment_unread, without_secrets

NAMES = ("name", "output_dir", "plugins")  # the settings without a target: where a run lies and where code is found
LENGTH = ("max_images", "epochs")  # of `run`
LONGEST_NAME = 200  # bytes of a folder's name, which may have 255 with what is added
HEADLINE = ("task", "model")  # of a run's default name, where the task declares no headline of its own


def signature(cfg: DictConfig, pace: Pace | None = None) -> str:
    """8 hex characters over everything that can change the trained weights, so that a run directory is never shared.

    pace: by default, that of the config on as many processes as this one is one of.
    """
    return hashlib.sha256(json.dumps(identity(cfg, pace), sort_keys=True).encode()).hexdigest()[:8]


def kin(cfg: DictConfig) -> str:
    """The signature, less images a step and chunk: runs that differ in these alone share it."""
    return signature(cfg, Pace(0, 1))


def identity(cfg: DictConfig, pace: Pace | None = None) -> dict[str, Any]:
    """What the signature hashes: group -> [the option's name, its values that are no defaults], nested nodes alike."""
    plugins = tuple(cfg.get("plugins") or ())
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    if "run" in content:
        content["run"] = as_one_process(content["run"], pace or pace_in(content["run"], world_size()))
    if open_ended(cfg):
        content["run"] = {key: value for key, value in content["run"].items() if key not in LENGTH}
    for group in of_several():
        # settings of an option that is not chosen are left alone
        content[group] = {key: node for key, node in (content.get(group) or {}).items() if holds_target(node)}
    described = {
        key: _described(node, plugins)
        for key, node in content.items()
        if key not in NAMES and not _is_harmless(node, plugins)
    }
    without = {group: _described(node, plugins) for group, node in legacy.ADDED.items()}
    return {key: said for key, said in described.items() if said not in (None, {}) and said != without.get(key)}


def open_ended(cfg: DictConfig) -> bool:
    """Whether a longer run continues a shorter one: a rate's curve depends on the length, a constant rate does not."""
    target = _located(str(cfg.lr.get("_target_")), tuple(cfg.get("plugins") or ()))
    return bool(declared(target, "open_ended", False))


def run_dir(cfg: DictConfig, choices: Mapping[str, str], pace: Pace | None = None) -> Path:
    """Where this run lies: <output_dir>/<name>-<signature>, or the directory in which an earlier version began it.

    pace: as for `signature`. Raises UserError for a name that is no name of a folder in output_dir.
    """
    groups = declared(_located(str(cfg.task._target_), tuple(cfg.get("plugins") or ())), "headline", HEADLINE)
    name = cfg.name or "-".join(choices.get(group, group) for group in groups)
    _refuse_name(str(name))
    home = Path(cfg.output_dir).expanduser() / f"{name}-{signature(cfg, pace)}"
    try:
        return home if home.exists() else _begun_before(home, tuple(cfg.get("plugins") or ())) or home
    except OSError as error:
        raise UserError(f"output_dir={cfg.output_dir} cannot be read ({error.strerror}); set output_dir=DIR") from error


def _refuse_name(name: str) -> None:
    """Raises UserError for a name that leads out of output_dir or that no folder can have."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or not name.isprintable() or name != name.strip():
        reason = "a run lies in output_dir: set name=NAME, without '..', a leading '/' or special characters"
    elif max(len(part.encode()) for part in parts) > LONGEST_NAME:
        reason = f"longer than {LONGEST_NAME} bytes; set a shorter name=NAME"
    else:
        return
    raise UserError(f"name={name[:80]!r}: {reason}")


# --- what is hashed ---------------------------------------------------------------------------------------------------


def _described(value: Any, plugins: tuple[str, ...]) -> Any:
    """A value of a resolved config as the signature sees it; [name, values] for a node with a target."""
    if isinstance(value, list):
        return [_described(item, plugins) for item in value if not _is_harmless(item, plugins)]
    if not isinstance(value, dict):
        return _settled(value)
    if "_target_" not in value:
        return {key: _described(item, plugins) for key, item in value.items() if not _is_harmless(item, plugins)}
    name = str(value["_target_"])
    return [public_name(name), dict(_values(value, _located(name, plugins), plugins))]


def _values(
    node: Mapping[str, Any], target: Callable[..., Any] | None, plugins: tuple[str, ...]
) -> Iterator[tuple[str, Any]]:
    """The parameters of a node that can change the weights, with their values, less those at their default."""
    parameters = inspect.signature(target).parameters if target else {}
    without_effect = declared(target, "without_effect", ())
    for key, value in node.items():
        if key.startswith("_") or key in without_effect:
            continue
        said = _described(value if target is None or holds_target(value) else _coerced(target, key, value), plugins)
        if key not in parameters or said != _settled(parameters[key].default):
            yield key, said


def _is_harmless(node: Any, plugins: tuple[str, ...]) -> bool:
    """Whether a node's target says that it cannot change the weights."""
    if not isinstance(node, dict) or "_target_" not in node:
        return False
    return not declared(_located(str(node["_target_"]), plugins), "changes_weights", True)


def public_name(target: str) -> str:
    """'min_snr' for nai_xl.diffusion.loss.min_snr, wherever it lies inside nai_xl; the full path of anything else."""
    now = legacy.moved(target)
    return now.rpartition(".")[2] if now.startswith("nai_xl.") else now


def _located(name: str, plugins: tuple[str, ...]) -> Callable[..., Any] | None:
    """None for a target that cannot be loaded: the check tells why, and the run has a directory to note it in."""
    try:
        return locate(name, plugins)
    except UserError:
        return None


def declared(target: Callable[..., Any] | None, name: str, otherwise: Any) -> Any:
    """What an option, or a class that it is derived from, says of itself; `otherwise` where it says nothing."""
    return inspect.getattr_static(target, name, otherwise)


def _coerced(target: Callable[..., Any], key: str, value: Any) -> Any:
    """As the target would get it: '5' as 5.0. What the check will refuse stays as it is."""
    try:
        return coerced(target, key, value)
    except ValidationError:
        return value


def _settled(value: Any) -> Any:
    """A value as JSON has it, the same for all that are the same setting: 5 and 5.0, a tuple and a list."""
    if isinstance(value, dict):
        return {str(key): _settled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_settled(item) for item in value]
    if inspect.isfunction(value) or inspect.isclass(value):
        return [public_name(f"{value.__module__}.{value.__qualname__}"), {}]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


# --- runs of earlier versions -----------------------------------------------------------------------------------------


def _begun_before(home: Path, plugins: tuple[str, ...]) -> Path | None:
    """The directory in which an earlier version, whose signatures were others, began the run that would have `home`.

    Only what lies beside `home` under the same name is looked at, and only a config.yaml of a run that may lie
    elsewhere today is parsed. Once this version has continued the run, arm.json has today's signature.
    """
    wanted = home.name[-8:]
    beside = re.compile(re.escape(home.name.removesuffix(wanted)) + "[0-9a-f]{8}")
    for path in sorted(home.parent.iterdir()) if home.parent.is_dir() else ():
        if beside.fullmatch(path.name) and path.is_dir():
            noted = _noted(path)
            if noted and noted.signature == wanted:
                return path
            if (noted is None or noted.kin is None) and _of_earlier(path, plugins) == wanted:
                return path
    return None


def _noted(run: Path) -> Arm | None:
    """A run's arm.json."""
    with suppress(UserError):  # a damaged file is told to whoever asks for that run
        return read_arm(run)
    return None


def _of_earlier(run: Path, plugins: tuple[str, ...]) -> str | None:
    """Today's signature of a run of an earlier version that has had another; None for others."""
    with suppress(UserError):
        pace = misplaced(run)
        if pace or legacy.made_by_0_1(run):
            return _of_stored(run, (run / "config.yaml").stat().st_mtime_ns, pace or pace_of(run), plugins)
    return None


@functools.cache
def _of_stored(run: Path, changed: int, pace: Pace | None, plugins: tuple[str, ...]) -> str:
    """The signature of the run's config.yaml. `changed`, its modification time, makes a rewritten file be read anew."""
    stored = legacy.stored_config(run, plugins)
    return signature(stored, pace or pace_in(OmegaConf.to_container(stored.run, resolve=True), 1))  # type: ignore[arg-type]


def unfinished_kin(cfg: DictConfig, home: Path) -> dict[Path, Pace]:
    """Unfinished runs beside `home` that differ from it in their pace alone, with that pace."""
    found: dict[Path, Pace] = {}
    for path in sorted(home.parent.iterdir()) if home.parent.is_dir() else ():
        noted = _noted(path) if path != home and path.is_dir() else None
        if noted and noted.kin == kin(cfg) and noted.status != "FINISHED" and (pace := pace_of(path)):
            found[path] = pace
    return found


def begun_with_former(cfg: DictConfig, choices: Mapping[str, str]) -> tuple[Path, str] | None:
    """The run that an earlier version has begun with what were defaults then, and the overrides that continue it."""
    changes = {word: change for word, change in legacy.FORMER.items() if _would_change(cfg, change)}
    for count in range(len(changes), 0, -1):
        for words in combinations(changes, count):
            older: Any = OmegaConf.merge(cfg, *(changes[word] for word in words))
            if (place := run_dir(older, choices)).exists():
                return place, " ".join(words)
    return None


def _would_change(cfg: DictConfig, change: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the config has these settings, and not as they are in `change`."""
    return all(
        key in cfg[group] and cfg[group][key] != value for group, of in change.items() for key, value in of.items()
    )


# --- what the package's own options leave out of it -------------------------------------------------------------------


@functools.cache
def left_out() -> tuple[str, ...]:
    """What no run's identity holds of the package's options, as the keys begin: 'tracker', 'run.log_every'.

    Imports every option, which takes seconds.
    """
    found: dict[str, list[bool]] = {}
    for key, target in _targets():
        found.setdefault(key.split(".")[0], []).append(not declared(target, "changes_weights", True))
    whole = [key for key, harmless in found.items() if all(harmless)]
    options = [key for key, target in _targets() if not declared(target, "changes_weights", True)]
    parameters = [f"{key}.{name}" for key, target in _targets() for name in declared(target, "without_effect", ())]
    parts = dict.fromkeys(key for key in (*options, *parameters) if key.split(".")[0] not in whole)
    return (*NAMES, *whole, *parts)


def _targets() -> Iterator[tuple[str, Callable[..., Any] | None]]:
    """Key and target of every node that the package's yaml files have at their top."""
    for path in sorted([*conf_dir().glob("*.yaml"), *conf_dir().glob("*/*.yaml")]):
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        at = (
            ""
            if path.parent == conf_dir() or "@package _global_" in path.read_text(encoding="utf-8")
            else path.parent.name
        )
        nodes = {at: content} if "_target_" in content else {f"{at}.{key}".lstrip("."): content[key] for key in content}
        for key, node in nodes.items():
            if isinstance(node, dict) and "_target_" in node:
                yield key, _located(node["_target_"], ())


# --- a config in short ------------------------------------------------------------------------------------------------


def arm(cfg: DictConfig, overrides: Sequence[str] | None = None) -> dict[str, Any]:
    """The values of the keys that a sweep varies, less the seed; {} outside of a sweep.

    `overrides`: those that gave them; None for those of the program that is running.
    """
    if overrides is None:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    given = {override.get_key_element().lstrip("+"): override.get_value_element_as_str() for override in parsed}
    # of arms that are listed one by one not all need name every key
    keys = [str(key) for key in cfg.sweep.varied if key != "run.seed" and (key in given or not cfg.sweep.arms)]
    return {key: _chosen(cfg, key, given.get(key, "")) for key in keys}


def _chosen(cfg: DictConfig, key: str, given: str) -> Any:
    """A setting's value with its type, or the name of a group's option as it was given."""
    value = OmegaConf.select(cfg, key) if re.fullmatch(r"[\w.]+", key) else None
    return without_secrets(given if value is None or isinstance(value, DictConfig) else plain(value), key)


def flat(cfg: DictConfig) -> dict[str, Any]:
    """'optimizer.lr' -> 1e-3, for every leaf but `_target_` and its like, and those that repeat a setting of the run
    (model.seed: ${run.seed}): in a comparison of runs they would stand beside what was varied as if varied, too. It is
    for the record: *** stands for secrets, and a variable of the environment keeps its name.
    """

    def leaves(node: Any, written: Any, at: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                if not str(key).startswith("_"):
                    inner = written.get(key) if isinstance(written, dict) else None
                    yield from leaves(value, inner, f"{at}.{key}" if at else str(key))
        elif not (isinstance(written, str) and re.fullmatch(r"\$\{run\.\w+\}", written)):
            yield at, node

    with environment_unread():
        resolved = without_secrets(OmegaConf.to_container(cfg, resolve=True))
    return dict(leaves(resolved, OmegaConf.to_container(cfg, resolve=False), ""))
