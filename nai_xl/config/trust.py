"""What a config may call. A yaml, or a whole run directory, may come from a stranger, and must not run a program.

Called are the functions and classes that the package's own yaml files name, optimizers of the known libraries, and
what lies in the packages that were named on the command line: 'plugins=[mine]'. A yaml cannot trust itself.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nai_xl.config.groups import conf_dir
from nai_xl.errors import UserError

OPTIMIZERS = ("torch.optim.", "torchao.optim.", "bitsandbytes.optim.")
HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "colorlog.ColoredFormatter")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"  # Hydra's own, and the only one that a yaml may name
# settings of Hydra's plug-ins that are programs or names of functions
PROGRAMS = ("hydra.launcher.setup", "hydra.launcher.additional_parameters", "hydra.sweeper.custom_search_space")
DEEPEST = 40  # levels of a config; one whose interpolations lead in a circle has no end


@functools.cache
def options() -> frozenset[str]:
    """Every target that the package's own yaml files name."""
    named = re.compile(r"_target_: *['\"]?([\w.]+)")
    texts = (path.read_text(encoding="utf-8") for path in conf_dir().rglob("*.yaml"))
    return frozenset(target for text in texts for target in named.findall(text))


def refuse_stranger(target: str, name: str, plugins: Sequence[str]) -> None:
    """Raises UserError for a target that no config may call. name: what the config calls it, if it has moved since."""
    if target in options() or name.startswith(tuple(f"{plugin}." for plugin in plugins)):
        return
    package = name.split(".")[0]
    if package == "nai_xl":
        module = name.rpartition(".")[0]
        raise UserError(
            f"_target_ {name} cannot be loaded: it is no option of a yaml of nai_xl; to allow it all the same, type "
            f"'plugins=[{module}]' on the command line"
        )
    if not name.startswith(OPTIMIZERS):
        raise UserError(
            f"_target_ {name} is outside nai_xl; to allow it type 'plugins=[{package}]' on the command line"
        )


def refuse_no_optimizer(found: Any, name: str, plugins: Sequence[str]) -> None:
    """Raises UserError for what lies beside the optimizers in their packages: torch.optim.lr_scheduler has partial."""
    if not name.startswith(OPTIMIZERS) or name.startswith(tuple(f"{plugin}." for plugin in plugins)):
        return
    kinds = getattr(found, "__mro__", ())
    if not any((kind.__module__, kind.__name__) == ("torch.optim.optimizer", "Optimizer") for kind in kinds):
        module = name.rpartition(".")[0]
        raise UserError(f"_target_ {name} is no optimizer; to allow it type 'plugins=[{module}]' on the command line")


def typed_plugins(arguments: Sequence[str] | None = None) -> tuple[str, ...]:
    """The packages that a command line names as plug-ins; by default, that of this program."""
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if is_plugins(word)]
    found: list[Any] = []
    for word in words:
        with suppress(HydraException):  # whoever composes tells it
            parser = OverridesParser.create()
            override = parser.parse_override(word)
            swept = override.is_sweep_override() and override.is_discrete_sweep()
            texts = [f"plugins={text}" for text in override.sweep_string_iterator()] if swept else [word]
            values = [parser.parse_override(text).value() for text in texts]
            found += [item for value in values if isinstance(value, list) for item in value]
    return tuple(dict.fromkeys(map(str, found)))


def is_plugins(word: str) -> bool:
    """Whether this word of a command line names plug-ins."""
    return re.match(r"\+{0,2}plugins=", word) is not None


def trusted(stored: DictConfig, plugins: Sequence[str] | None = None) -> list[str]:
    """Those of a stored config's plug-ins that may be called: `plugins`, by default what this program's user typed.
    The others are told once on stderr.
    """
    typed = typed_plugins() if plugins is None else plugins
    named = [str(name) for name in stored.get("plugins") or ()]
    if left_out := [name for name in named if name not in typed]:
        _tell_left_out(",".join(left_out), ",".join(dict.fromkeys([*typed, *named])))
    return [name for name in named if name in typed]


@functools.cache
def _tell_left_out(names: str, wanted: str) -> None:
    print(f"plug-ins of the run are not called: {names}; to allow it add 'plugins=[{wanted}]'", file=sys.stderr)


# --- what Hydra composes ----------------------------------------------------------------------------------------------


def refuse_composed(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raises UserError for a composed config, its `hydra` node included, whose yaml files would call a stranger."""
    named = cfg.get("plugins") or ()
    if not isinstance(named, ListConfig | tuple):
        raise UserError(f"plugins={named}: write 'plugins=[{named}]'")
    typed = typed_plugins(overrides)
    if own := [str(name) for name in named if str(name) not in typed]:
        raise UserError(
            f"a yaml names plugins: {own}, and a yaml cannot trust itself; to let it call what lies there, type "
            f"'plugins=[{','.join(dict.fromkeys([*typed, *own]))}]' on the command line"
        )
    given: Any = OmegaConf.to_container(cfg.hydra.overrides)  # not resolved: as they were typed
    if added := [word for kind in ("task", "hydra") for word in given[kind] if word not in overrides]:
        raise UserError(f"a yaml sets hydra.overrides: {added}; type them on the command line")
    for key in _overriding_keys(cfg):
        if key == "plugins" or key.startswith("hydra"):
            raise UserError(f"a yaml sweeps {key}, which only the command line may set; type '{key}=...' there")
    # not those that hold what was typed, and no node that is called
    node = {key: _resolved(_value(cfg.hydra, key)) for key in cfg.hydra if key not in ("overrides", "job")}
    for target in _targets(node):
        if target not in _of_hydra() and not target.startswith(tuple(f"{name}." for name in typed)):
            package = target.split(".")[0]
            raise UserError(
                f"hydra: _target_ {target} is no plug-in of Hydra; to allow it type 'plugins=[{package}]' on the "
                "command line"
            )
    for value in [*_calls_of_logging(node["job_logging"]), *_calls_of_logging(node["hydra_logging"])]:
        raise UserError(f"hydra: logging would call or open {value}; leave it out of the yaml")
    _refuse_programs(cfg, overrides)


def _refuse_programs(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raises UserError for what other programs would do or read, unless the command line says it."""

    def typed(key: str) -> bool:
        return any(word.lstrip("+").startswith(key) for word in overrides)

    for key in PROGRAMS:
        if OmegaConf.select(cfg, key, throw_on_missing=False) and not typed(key):
            raise UserError(f"a yaml sets {key}, which names a program; only the command line may: type '{key}=...'")
    if cfg.hydra.job.env_set.keys() - set(cfg.hydra.job.env_copy) and not typed("hydra.job.env_set"):
        raise UserError("a yaml sets hydra.job.env_set; only the command line may set what other programs read")


def _overriding_keys(cfg: DictConfig) -> Iterator[str]:
    """The keys that yaml files sweep: they become overrides of each arm, as if they had been typed."""
    swept = (OmegaConf.select(cfg, f"hydra.sweeper.{name}") for name in ("params", "search_space"))  # optuna has both
    arms = OmegaConf.select(cfg, "sweep.arms") or []
    yield from (str(key).lstrip("+~") for node in [*swept, *arms] if isinstance(node, DictConfig) for key in node)


def _resolved(node: Any, depth: int = 0) -> Any:
    """A node as plain dicts and lists. An interpolation stands for what it leads to, which may be a node; one that
    cannot be resolved yet stays as it is written.

    Raises UserError for one whose name depends on another that is not known yet: it could lead anywhere.
    """
    if depth > DEEPEST:
        raise UserError("hydra: the settings of a yaml have no end; leave out the interpolation that leads in a circle")
    if not isinstance(node, DictConfig | ListConfig):
        return node
    keys = node.keys() if isinstance(node, DictConfig) else range(len(node))
    found = {key: _resolved(_value(node, key), depth + 1) for key in keys}
    return found if isinstance(node, DictConfig) else [*found.values()]


def _value(node: DictConfig | ListConfig, key: Any) -> Any:
    try:
        return node[key]
    except OmegaConfBaseException:
        written: Any = node._get_node(key)
        text = str(written._value())
        if re.search(r"\$\{[^}]*\$\{", text):
            raise UserError(f"hydra: {text} cannot be resolved before the run; write out what it stands for") from None
        return text


def _targets(node: Any) -> Iterator[str]:
    """Every target below a node of plain dicts and lists."""
    if isinstance(node, dict) and "_target_" in node:
        yield str(node["_target_"])
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _targets(value)


def _of_hydra() -> frozenset[str]:
    """The targets that Hydra's installed plug-ins have registered, and those of the package's own train.yaml."""

    def registered(tree: Any) -> Iterator[str]:
        for item in tree.values():
            yield from _targets(_resolved(item.node)) if isinstance(item, ConfigNode) else registered(item)

    return options() | frozenset(registered(ConfigStore.instance().repo.get("hydra", {})))


def _calls_of_logging(node: Any) -> Iterator[str]:
    """What a set-up of logging would call, import or open beside the usual handlers, streams and Hydra's own file."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        called = key in ("()", "class") and value not in HANDLERS
        opened = key == "filename" and value != LOG_FILE
        imported = isinstance(value, str) and value.startswith("ext://") and value not in STREAMS
        unknown = isinstance(value, str) and "${" in value and key != "filename"
        if called or opened or imported or unknown:
            yield str(value)
        yield from _calls_of_logging(value)


def _guarded(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Hydra calls the targets of its own node as soon as it has composed: so they are looked at there."""

    @functools.wraps(load)
    def load_configuration(
        self: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        *args: Any,
        **more: Any,
    ) -> DictConfig:
        cfg = load(self, config_name, overrides, run_mode, **more)
        refuse_composed(cfg, overrides)
        return cfg

    return load_configuration


if not hasattr(ConfigLoaderImpl.load_configuration, "__wrapped__"):
    ConfigLoaderImpl.load_configuration = _guarded(ConfigLoaderImpl.load_configuration)  # type: ignore[method-assign]
