"""The check: a config against its targets' signatures, before anything is built."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import ValidationError

from nai_xl.config import legacy_commands
from nai_xl.config.build import coerced, holds_target, locate, plain
from nai_xl.config.groups import groups, of_several, settings
from nai_xl.errors import UserError


def check(cfg: DictConfig, only: Iterable[str] | None = None, choices: Collection[str] = ()) -> None:
    """Walk the config, or `only` these groups of it, against the signatures of its targets.

    `choices` are the groups that the config was composed of: those of a plug-in are known by them. Raises UserError
    with one line for every mistake.
    """
    plugins = tuple(cfg.get("plugins") or ())
    if only is None:
        mistakes = [*unknown_settings(cfg, choices), *_mistakes(cfg, "", plugins)]
    else:
        mistakes = [line for group in only for line in _mistakes(cfg[group], group, plugins)]
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))


def unknown_settings(cfg: DictConfig, choices: Collection[str] = ()) -> Iterator[str]:
    """A line for everything at the top of the config that is neither a setting nor a group nor a node to be built."""
    known = [*settings(), *groups(), *choices]
    for key in map(str, cfg):
        if key not in known and not (isinstance(cfg.get(key), DictConfig) and "_target_" in cfg[key]):
            yield f"no setting '{key}'{did_you_mean(key, known)}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown word: the known one that is nearest, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = [name for name in known if not name.startswith("_")]
    return f"; there is {', '.join(shown)}" if shown else ""


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
        elif at in of_several() and not isinstance(node[key], DictConfig):
            yield f"{path}={plain(node[key])}: {at} holds options only; set '{at}=[OPTION,...]'"
        else:
            yield from _mistakes(node[key], path, plugins)


def _against_signature(node: DictConfig, at: str, target: Callable[..., Any]) -> Iterator[str]:
    parameters = inspect.signature(target).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = [str(key) for key in node if not str(key).startswith("_")]
    for key in given:
        if key not in parameters:
            if not anything:
                yield _unknown_parameter(node, f"{at}.{key}", key, target, list(parameters))
        elif OmegaConf.is_interpolation(node, key):
            continue  # told once, where the value stands
        elif not OmegaConf.is_missing(node, key) and not holds_target(node[key]):
            try:
                coerced(target, key, plain(node[key]))
            except ValidationError as error:
                first = error.errors()[0]
                reason = first["msg"].removeprefix("Value error, ")
                yield f"{at}.{key}={plain(node[key])}: {reason[0].lower()}{reason[1:]}"
    if not node.get("_partial_", False):
        for name, parameter in parameters.items():
            needed = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            )
            if needed and name not in given:
                yield f"{at}.{name} is missing; set +{at}.{name}=..."


def _unknown_parameter(node: DictConfig, at: str, key: str, target: Callable[..., Any], known: list[str]) -> str:
    if now := legacy_commands.now(at, None if OmegaConf.is_missing(node, key) else node[key]):
        return now
    return f"{at}: no parameter '{key}' in {target.__name__}{did_you_mean(key, known)}"
