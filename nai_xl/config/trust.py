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

from nai_xl.config.groups import conf_dir
from nai_xl.errors import UserError

OPTIMIZERS = ("torch.optim.", "torchao.optim.", "bitsandbytes.optim.")
HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "colorlog.ColoredFormatter")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


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
    for key in _overriding_keys(cfg):
        if key == "plugins" or key.startswith("hydra"):
            raise UserError(f"a yaml sweeps {key}, which only the command line may set; type '{key}=...' there")
    for target in _targets(cfg.hydra):
        if target not in _of_hydra() and not target.startswith(tuple(f"{name}." for name in typed)):
            package = target.split(".")[0]
            raise UserError(
                f"hydra: _target_ {target} is no plug-in of Hydra; to allow it type 'plugins=[{package}]' on the "
                "command line"
            )
    for value in [*_calls_of_logging(cfg.hydra.job_logging), *_calls_of_logging(cfg.hydra.hydra_logging)]:
        raise UserError(f"hydra: logging would call {value}; leave it out of the yaml")
    if cfg.hydra.job.env_set and not any(word.lstrip("+").startswith("hydra.job.env_") for word in overrides):
        raise UserError("a yaml sets hydra.job.env_set; only the command line may set what other programs read")


def _overriding_keys(cfg: DictConfig) -> Iterator[str]:
    """The keys that yaml files sweep: they become overrides of each arm, as if they had been typed."""
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    arms = OmegaConf.select(cfg, "sweep.arms") or []
    yield from (str(key).lstrip("+~") for node in [params, *arms] if isinstance(node, DictConfig) for key in node)


def _targets(node: Any) -> Iterator[str]:
    """Every target below a node, as it is written: an interpolation is none that is known."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node)
    if isinstance(node, dict) and "_target_" in node:
        yield str(node["_target_"])
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _targets(value)


def _of_hydra() -> frozenset[str]:
    """The targets that Hydra's installed plug-ins have registered, and those of the package's own train.yaml."""

    def registered(tree: Any) -> Iterator[str]:
        for item in tree.values():
            yield from _targets(item.node) if isinstance(item, ConfigNode) else registered(item)

    return options() | frozenset(registered(ConfigStore.instance().repo.get("hydra", {})))


def _calls_of_logging(node: Any) -> Iterator[str]:
    """What a set-up of logging would call or import beside the usual handlers and streams."""
    content: Any = OmegaConf.to_container(node) if isinstance(node, DictConfig) else node
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        called = key in ("()", "class") and value not in HANDLERS
        if called or (isinstance(value, str) and value.startswith("ext://") and value not in STREAMS):
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
