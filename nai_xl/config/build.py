"""From a checked config node to the object that it describes: locate the target, coerce the values, call.

A node with `_target_` names a function or class; the target's signature is the node's schema. `_partial_` nodes are
completed by the caller of `build`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter
from pydantic_core import SchemaError

from nai_xl.config.legacy import moved
from nai_xl.config.trust import refuse_no_optimizer, refuse_stranger
from nai_xl.errors import UserError, keyed


def locate(name: str, plugins: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The function or class called `package.module.name`, or so by version 0.1.

    Raises UserError if it is missing or not to be trusted: config.trust.
    """
    refuse_stranger(moved(name), name, plugins)
    module_name, _, attribute = moved(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"_target_ {name} cannot be loaded: {error}") from error
    refuse_no_optimizer(found, name, plugins)
    if not callable(found):
        raise UserError(f"_target_ {name} is not callable")
    return found


def member(node: DictConfig, name: str, plugins: tuple[str, ...] = ()) -> Any:
    """A member of a node's option, completed by the node's settings so far as the member takes them.

    None where the option offers no such member. Settings that are still missing (???) are left out.
    """
    target = locate(str(node._target_), plugins)
    found = inspect.getattr_static(target, name, None)
    if found is None:
        return None
    taken = [str(key) for key in node if key in inspect.signature(found).parameters]
    given = {key: coerced(target, key, plain(node[key])) for key in taken if not OmegaConf.is_missing(node, key)}
    return functools.partial(found, **given)


def build(node: Any, plugins: tuple[str, ...] = (), **given: Any) -> Any:
    """The object that a checked config node describes, nested nodes first; `given` completes its arguments.

    A `_partial_` node without `given` becomes a functools.partial. A ValueError of the target becomes a UserError that
    begins with the node's key.
    """
    if isinstance(node, ListConfig):
        return [build(item, plugins) for item in node]
    if not isinstance(node, DictConfig):
        return node
    if "_target_" not in node:
        return {str(key): build(node[key], plugins) for key in node}
    if node.get("_partial_", False) and not given:
        return _settled(node, plugins)
    return completed(node, plugins, **given)


def completed(node: DictConfig, plugins: tuple[str, ...] = (), **given: Any) -> Any:
    """As `build`, for a node with a target; a `_partial_` one is called even if nothing is `given`."""
    make = _settled(node, plugins)
    with keyed(node._get_full_key(None) or make.func.__name__):  # a node that stands alone has no key
        return make(**given)


def _settled(node: DictConfig, plugins: tuple[str, ...]) -> functools.partial[Any]:
    """A node's target with the node's own arguments."""
    target = locate(str(node._target_), plugins)
    arguments = {
        str(key): build(node[key], plugins) if holds_target(node[key]) else coerced(target, str(key), plain(node[key]))
        for key in node
        if not str(key).startswith("_")
    }
    return functools.partial(target, **arguments)


def plain(value: Any) -> Any:
    """A value of a config with lists and dicts for OmegaConf's own."""
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value


def holds_target(value: Any) -> bool:
    """Whether a value of a config is a node to be built, or holds one at any depth."""
    if isinstance(value, DictConfig | dict):
        return "_target_" in value or any(holds_target(value[key]) for key in value)
    return isinstance(value, ListConfig | list) and any(map(holds_target, value))


def coerced(target: Callable[..., Any], name: str, value: Any) -> Any:
    """`value` as the type that the target's annotation asks for. Raises pydantic's ValidationError."""
    adapter = _adapter(target, name)
    return _home_expanded(adapter.validate_python(value)) if adapter else value


def _home_expanded(value: Any) -> Any:
    """Paths with the home directory for ~, which a shell leaves in quotes."""
    if isinstance(value, list | tuple) and any(isinstance(item, Path) for item in value):
        return type(value)(map(_home_expanded, value))
    return value.expanduser() if isinstance(value, Path) else value


@functools.cache
def _adapter(target: Callable[..., Any], name: str) -> TypeAdapter[Any] | None:
    """None where nothing is annotated, or nothing that pydantic could check."""
    hint = _hint(target, name)
    if hint is None:
        return None
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, SchemaError, TypeError):
        # SchemaError: isinstance does not know this protocol. TypeError: pydantic takes no config for a type that has
        # its own, such as a dataclass
        return None


def _hint(target: Callable[..., Any], name: str) -> Any:
    """The annotation of one parameter. Each is resolved alone: one bad hint (torch.optim has some) spoils no other."""
    parameter = inspect.signature(target).parameters.get(name)
    if parameter is None or parameter.annotation is parameter.empty:
        return None
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        return eval(parameter.annotation, vars(sys.modules[_module(target, name)]))  # noqa: S307 - code of a trusted package
    except NameError:
        return None  # imported for type checkers only


def _module(target: Callable[..., Any], name: str) -> str:
    """The module in which a parameter's annotation was written: for an inherited one, that of the base class."""
    if not isinstance(target, type):
        return inspect.unwrap(target).__module__
    for kind in target.__mro__:
        init: Any = vars(kind).get("__init__")
        # the __init__ that a dataclass is given takes its annotations from the fields, wherever those were defined
        by_hand = inspect.isfunction(init) and init.__code__.co_filename != "<string>"
        if name in inspect.get_annotations(kind) or (by_hand and name in inspect.signature(init).parameters):
            return kind.__module__
    return target.__module__
