"""From a composed config to built objects: check, build, signature. No other file but the entry points knows Hydra.

A node with `_target_` names a function or class; the target's signature is the node's schema. `_partial_` nodes are
completed by the caller of `build`.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from hydra_plugins.nai_xl_sweep import as_overrides, listed
from nai_xl.errors import UserError, one_line

# a yaml from a stranger can name any callable: only these packages, and what the user lists in `plugins`, are called
TRUSTED = ("nai_xl", "torch.optim", "torchao.optim", "bitsandbytes.optim")
SETTINGS = ("name", "output_dir", "plugins", "native", "run", "sampling", "objective", "noise", "profile", "sweep")
VOLATILE = (
    "output_dir plugins tracker evals checkpoint distributed cache data.cache native model.config sampling profile "
    "sweep run.log_every run.checkpoint_every run.keep_checkpoints run.workers ema.device "
    "memory.gradient_checkpointing memory.offload_activations"  # which change what is learned by roundings at most
).split()
LENGTH = ("run.max_images", "run.epochs")
HEADLINE = ("model", "schedule", "parameterization", "loss")  # of a run's default name


def conf_dir() -> Path:
    """The config groups: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def groups() -> list[str]:
    """Every config group, in alphabetical order."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


# --- check ------------------------------------------------------------------------------------------------------------


def check(cfg: DictConfig, only: Iterable[str] | None = None) -> None:
    """Walk the config, or `only` these groups of it, against its targets' signatures.

    Raises UserError with one line for every mistake.
    """
    plugins = tuple(cfg.get("plugins") or ())
    nodes = [("", cfg)] if only is None else [(group, cfg[group]) for group in only]
    mistakes = [*_unknown_top_level(cfg), *(line for at, node in nodes for line in _mistakes(node, at, plugins))]
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))


def _unknown_top_level(cfg: DictConfig) -> Iterator[str]:
    known = [*SETTINGS, *groups()]
    yield from (f"no setting '{key}'{_did_you_mean(key, known)}" for key in map(str, cfg) if key not in known)


def _mistakes(node: Any, at: str, plugins: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, ListConfig):
        for i in range(len(node)):
            yield from _mistakes(node[i], f"{at}[{i}]", plugins)
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        try:
            target = locate(str(node._target_), plugins)
        except UserError as error:
            yield f"{at}: {error}"
            return
        yield from _against_signature(node, at, target)
    for key in node:
        path = f"{at}.{key!s}" if at else str(key)
        if OmegaConf.is_missing(node, key):
            yield f"{path} is missing; set {path}=..."
        else:
            yield from _mistakes(node[key], path, plugins)


def _against_signature(node: DictConfig, at: str, target: Callable[..., Any]) -> Iterator[str]:
    parameters = inspect.signature(target).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = [str(key) for key in node if not str(key).startswith("_")]
    for key in given:
        if key not in parameters:
            if not anything:
                hint = _did_you_mean(key, list(parameters))
                yield f"{at}.{key}: no parameter '{key}' in {target.__name__}{hint}"
        elif OmegaConf.is_interpolation(node, key):
            continue  # told once, where the value stands
        elif not OmegaConf.is_missing(node, key) and not _holds_target(node[key]):
            try:
                _coerced(target, key, _plain(node[key]))
            except ValidationError as error:
                first = error.errors()[0]
                reason = first["msg"].removeprefix("Value error, ")
                yield f"{at}.{key}={_plain(node[key])}: {reason[0].lower()}{reason[1:]}"
    if not node.get("_partial_", False):
        for name, parameter in parameters.items():
            needed = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            )
            if needed and name not in given:
                yield f"{at}.{name} is missing; set +{at}.{name}=..."


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = [name for name in known if not name.startswith("_")]
    return f"; there is {', '.join(shown)}" if shown else ""


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value


def _holds_target(value: Any) -> bool:
    if isinstance(value, DictConfig):
        return "_target_" in value or any(_holds_target(value[key]) for key in value)
    return isinstance(value, ListConfig) and any(map(_holds_target, value))


# --- build ------------------------------------------------------------------------------------------------------------


def locate(name: str, plugins: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The function or class called `package.module.name`. Raises UserError if it is missing or not to be trusted."""
    if not name.startswith(tuple(f"{package}." for package in (*TRUSTED, *plugins))):
        raise UserError(f"_target_ {name} is outside nai_xl; to allow it set plugins=[{name.split('.')[0]}]")
    module_name, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"_target_ {name} cannot be loaded: {error}") from error
    if not callable(found):
        raise UserError(f"_target_ {name} is not callable")
    return found


def build(node: Any, plugins: tuple[str, ...] = (), **given: Any) -> Any:
    """The object that a checked config node describes, nested nodes first; `given` completes its arguments.

    A `_partial_` node without `given` becomes a functools.partial.
    """
    if isinstance(node, ListConfig):
        return [build(item, plugins) for item in node]
    if not isinstance(node, DictConfig):
        return node
    if "_target_" not in node:
        return {str(key): build(node[key], plugins) for key in node}
    target = locate(str(node._target_), plugins)
    arguments = {
        str(key): build(node[key], plugins)
        if _holds_target(node[key])
        else _coerced(target, str(key), _plain(node[key]))
        for key in node
        if not str(key).startswith("_")
    }
    if node.get("_partial_", False) and not given:
        return functools.partial(target, **arguments)
    try:
        return target(**arguments, **given)
    except ValueError as error:
        raise UserError(f"{target.__name__}: {one_line(error)}") from error


def _coerced(target: Callable[..., Any], name: str, value: Any) -> Any:
    """`value` as the type that the target's annotation asks for. Raises pydantic's ValidationError."""
    hint = _hint(target, name)
    if hint is None:
        return value
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, TypeError):
        # TypeError: pydantic takes no config for a type that has its own, such as a dataclass
        return value
    return adapter.validate_python(value)


def _hint(target: Callable[..., Any], name: str) -> Any:
    """The annotation of one parameter. Each is resolved alone: one bad hint (torch.optim has some) spoils no other."""
    parameter = inspect.signature(target).parameters.get(name)
    if parameter is None or parameter.annotation is parameter.empty:
        return None
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        return eval(parameter.annotation, vars(sys.modules[target.__module__]))  # noqa: S307 - code of a trusted package
    except NameError:
        return None  # imported for type checkers only


# --- identity ---------------------------------------------------------------------------------------------------------


def signature(cfg: DictConfig) -> str:
    """8 hex characters over everything that can change the trained weights, so that a run directory is never shared."""
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    for path in (*VOLATILE, *(LENGTH if open_ended(cfg) else ())):
        *parents, leaf = path.split(".")
        node = functools.reduce(lambda n, key: n.get(key, {}), parents, content)
        node.pop(leaf, None)
    return hashlib.sha256(json.dumps(_whole(content), sort_keys=True, default=str).encode()).hexdigest()[:8]


def open_ended(cfg: DictConfig) -> bool:
    """Whether a longer run continues a shorter one: a rate's curve depends on the length, a constant rate does not."""
    return str(cfg.lr.get("_target_", "")).endswith(".constant")


def run_dir(cfg: DictConfig, choices: Mapping[str, str]) -> Path:
    """Where this run lies: <output_dir>/<name>-<signature>."""
    name = cfg.name or "-".join(choices.get(group, group) for group in HEADLINE)
    return Path(cfg.output_dir) / f"{name}-{signature(cfg)}"


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
    return given if value is None or isinstance(value, DictConfig) else _plain(value)


def opened(composed: DictConfig) -> tuple[DictConfig, dict[str, str], list[str]]:
    """A config composed together with its `hydra` node: without that, its choices, and the overrides that gave it."""
    cfg = composed.copy()
    with read_write(cfg), open_dict(cfg):
        hydra_node = cfg.pop("hydra")
    return cfg, _choices(cfg, hydra_node.runtime.choices), list(hydra_node.overrides.task)


def _whole(value: Any) -> Any:
    """5.0 as 5, everywhere: they are the same setting."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def flat(cfg: DictConfig) -> dict[str, Any]:
    """'optimizer.lr' -> 1e-3, for every leaf but `_target_` and its like, and those that repeat a setting of the run
    (model.seed: ${run.seed}): in a comparison of runs they would stand beside what was varied as if varied, too.
    """

    def leaves(node: Any, written: Any, at: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                if not str(key).startswith("_"):
                    inner = written.get(key) if isinstance(written, dict) else None
                    yield from leaves(value, inner, f"{at}.{key}" if at else str(key))
        elif not (isinstance(written, str) and re.fullmatch(r"\$\{run\.\w+\}", written)):
            yield at, node

    return dict(leaves(OmegaConf.to_container(cfg, resolve=True), OmegaConf.to_container(cfg, resolve=False), ""))


# --- entry points -----------------------------------------------------------------------------------------------------

Job = Callable[[DictConfig, dict[str, str]], float | None]  # config, group -> choice; what a search minimises


class SweepOfArms(Protocol):
    """How a program trains the arms of a sweep in processes of their own, and tells what became of them."""

    def launch(self, master: DictConfig, composed: Sequence[DictConfig]) -> list[float | UserError | None]: ...
    def tell(self) -> None: ...


def entry_point(job: Job, config_name: str = "train", sweep: SweepOfArms | None = None) -> Callable[[], None]:
    """`job` as a command line program: Hydra composes, `check` looks, mistakes are one message and exit status 1.

    Arms of a --multirun are `sweep`'s to train, unless hydra/launcher is another one; without it, this process's.
    """

    failed: list[UserError] = []

    def run(cfg: DictConfig) -> float | None:
        try:
            check(cfg)
            return job(cfg, _choices(cfg, HydraConfig.get().runtime.choices))
        except UserError as error:
            several = int(os.environ.get("WORLD_SIZE", "1")) > 1
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
        interrupted = False
        try:
            decorated()
        except (UserError, HydraException, OmegaConfBaseException) as error:
            mistake = error
        except KeyboardInterrupt:
            interrupted = True
        if sweep:
            sweep.tell()
        if mistake:
            _tell(mistake)
        if interrupted or mistake or failed:
            sys.exit(130 if interrupted else 1)

    return main


@contextmanager
def mistakes_told() -> Iterator[None]:
    """For programs that compose by themselves: a user's mistake inside the block is told and exits with status 1."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        _tell(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _choices(cfg: DictConfig, chosen: Mapping[str, Any]) -> dict[str, str]:
    """group -> option, in the order of train.yaml; groups of which several options can be chosen list them all."""
    named: dict[str, Any] = {}
    for group in [*(str(key) for key in cfg if key in groups()), "hardware", "recipe", "experiment", "debug"]:
        several = isinstance(cfg.get(group), DictConfig) and "_target_" not in cfg[group]
        named[group] = ", ".join(map(str, cfg[group])) if several else chosen.get(group)
    return {group: str(option) for group, option in named.items() if option}


def _tell(error: Exception) -> None:
    for line in filter(str.strip, _told(error).splitlines()):
        print(f"error: {line}", file=sys.stderr)


def _told(error: Exception) -> str:
    """Hydra's errors in words that name what to type instead."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if group in groups():
            options = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
            return f"{group}={option}: no such option{_did_you_mean(option, options)}"
    unknown = re.search(r"Could not override '([\w.]+)'", str(error))
    if isinstance(error, ConfigCompositionException) and unknown:
        return _told_unknown_key(unknown.group(1))
    if isinstance(error, OverrideParseException):
        return f"{one_line(error)} Quote what holds spaces, commas or brackets: 'key=\"a (1), b\"'"
    return str(error)


def _told_unknown_key(path: str) -> str:
    """Which key was meant by an override of one that does not exist."""
    overrides = [arg for arg in sys.argv[1:] if "=" in arg and not arg.startswith(("-", f"{path}=")) and "," not in arg]
    further = re.search(r"(?:^|\0)(?:--config-dir|-cd)[\0=]([^\0]+)", "\0".join(sys.argv[1:]))
    parent, _, key = path.rpartition(".")
    try:
        node: Any = compose([*overrides, *([_further(Path(further[1]))] if further else [])])
    except HydraException:  # another override is wrong too: suggest what the defaults know
        node = compose([])
    named = tuple(node.get("plugins") or ())
    for part in filter(None, parent.split(".")):
        node = node.get(part) if isinstance(node, DictConfig) else None
    if isinstance(node, DictConfig) and "_target_" in node:
        known = list(inspect.signature(locate(str(node._target_), named)).parameters)
        return f"{path}: no parameter '{key}' in {str(node._target_).rpartition('.')[2]}{_did_you_mean(key, known)}"
    known = [str(k) for k in node] if isinstance(node, DictConfig) else [*SETTINGS, *groups()]
    return f"no setting '{path}'{_did_you_mean(key, known)}"


def _further(config_dir: Path) -> str:
    """The override that adds a folder of config groups, as --config-dir does on a command line."""
    return f"hydra.searchpath=['file://{config_dir.absolute()}']"


def compose(overrides: list[str], config_name: str = "train") -> DictConfig:
    """The config that these overrides give, for use outside a command line."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose(config_name, overrides)


Swept = dict[str, str]  # the keys given several values -> this combination's values


def combinations(
    overrides: Sequence[str], config_dir: Path | None = None, config_name: str = "train"
) -> Iterator[tuple[Swept, dict[str, str], DictConfig]]:
    """Swept values, choices and config of every combination that a sweep over these overrides has.

    Values are split as `--multirun` splits them: 'a=x,y', 'a=range(1,4)' and 'a=glob(*)' are sweeps, 'a=[x,y]' is not.
    An experiment's own sweep is part of it, less the keys that are overridden, and so are the arms that it lists, each
    with a value for every key, "" where it has none. `config_dir`: further config groups.
    """
    extra = [] if config_dir is None else [_further(config_dir)]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        compose_all = functools.partial(hydra.compose, config_name, return_hydra_config=True)
        grid = _grid(overrides)
        points = list(_points(grid))
        first = compose_all([*extra, *points[0][1]])
        own = [f"{key}={value}" for key, value in (first.hydra.sweeper.params or {}).items() if key not in grid]
        arms = listed(first.sweep.arms, OverridesParser.create().parse_overrides(list(overrides)))
        keys = dict.fromkeys(key for arm in arms for key in arm)
        if own or arms:
            rest = {key: values for key, values in (_grid(own) | grid).items() if key.lstrip("+") not in keys}
            points = [
                ({**{key: arm.get(key, "") for key in keys}, **swept}, [*point, *as_overrides(arm)])
                for arm in arms or [{}]
                for swept, point in _points(rest)
            ]
        for number, (swept, point) in enumerate(points):
            cfg = first if number == 0 and not own and not arms else compose_all([*extra, *point])
            cfg, choices, _ = opened(cfg)
            yield swept, choices, cfg


def _grid(overrides: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """key -> its (value, override) pairs, several where it is swept."""
    grid: dict[str, list[tuple[str, str]]] = {}
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    for override in parser.parse_overrides(list(overrides)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            grid[key] = [("", str(override.input_line))]
        elif override.is_discrete_sweep():
            grid[key] = [(value, f"{key}={value}") for value in override.sweep_string_iterator()]
        else:
            raise UserError(f"{override.input_line}: an interval has no end of values; list some: {key}=a,b")
    return grid


def _points(grid: dict[str, list[tuple[str, str]]]) -> Iterator[tuple[Swept, list[str]]]:
    """Swept values and overrides of every point."""
    for point in itertools.product(*grid.values()):
        chosen = dict(zip(grid, point, strict=True))
        swept = {key.lstrip("+"): chosen[key][0] for key in grid if len(grid[key]) > 1}
        yield swept, [override for _, override in point]
