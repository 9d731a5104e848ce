"""The config groups as conf/ and the functions that it names describe them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from nai_xl import config
from nai_xl.docs.hints import hint, in_words
from nai_xl.errors import UserError

ENTRY = re.compile(r"^  - (?P<group>[a-z_]+): (?P<default>[^#]+?)(?: # (?P<decides>.+))?$", re.MULTILINE)
SOURCE = re.compile(r"\[(\w+)\] ([^\[]+)")


@dataclass(frozen=True)
class Parameter:
    """One setting of an option. `default` is the yaml's text, `own` the function's default where it is another."""

    key: str
    type: str
    default: str
    own: str
    meaning: str


@dataclass(frozen=True)
class Call:
    """A function or class that an option names, with the first paragraph of its docstring and the papers cited there.

    `members` are the constants of a class (or attributes of a function) by which it tells how it behaves.
    """

    target: str
    says: str
    sources: Mapping[str, str]
    members: Mapping[str, bool | float | str]
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Option:
    """One yaml: the first line of its header comment, the lines below that, its calls, and its text without header."""

    name: str
    description: str
    remarks: str
    calls: tuple[Call, ...]
    text: str


@dataclass(frozen=True)
class Group:
    """A folder of conf/. The default options come first; `several` if more than one can be chosen."""

    name: str
    decides: str
    defaults: tuple[str, ...]
    several: bool
    options: tuple[Option, ...]


def catalogue(conf: Path) -> list[Group]:
    """Every group of train.yaml's defaults list, in that order. Raises UserError where a description is missing."""
    primary = (conf / "train.yaml").read_text(encoding="utf-8")
    found = [_group(conf, *entry.group("group", "default", "decides")) for entry in ENTRY.finditer(primary)]
    forgotten = {folder.name for folder in conf.iterdir() if folder.is_dir()} - {group.name for group in found}
    if forgotten:
        raise UserError(f"conf/train.yaml: the defaults list has no entry for {', '.join(sorted(forgotten))}")
    return found


def _group(conf: Path, name: str, default: str, decides: str | None) -> Group:
    if not decides:
        raise UserError(f"conf/train.yaml: say beside '- {name}: {default}' what the group decides, after a #")
    chosen = yaml.safe_load(default)
    defaults = tuple(chosen) if isinstance(chosen, list) else tuple(filter(None, [chosen]))
    options = [_option(path) for path in sorted((conf / name).glob("*.yaml"))]
    options.sort(key=lambda option: option.name not in defaults)
    return Group(name, decides, defaults, isinstance(chosen, list), tuple(options))


def _option(path: Path) -> Option:
    group, text = path.parent.name, path.read_text(encoding="utf-8")
    header = re.match(r"(?:#.*\n|\n)*", text)
    assert header is not None  # the pattern matches nothing, too
    lines = [line.removeprefix("#").strip() for line in header[0].splitlines()]
    package = next((line.split()[1] for line in lines if line.startswith("@package")), group)
    description, *remarks = [line for line in lines if line and not line.startswith("@")] or [""]
    if not description:
        raise UserError(f"conf/{group}/{path.name}: begin with a comment line that says what the option is")
    node, data = yaml.compose(text), OmegaConf.to_container(OmegaConf.load(path))
    calls = _calls(text, node, data, "" if package == "_global_" else package)
    return Option(path.stem, description, " ".join(remarks), tuple(calls), text[header.end() :])


def _calls(text: str, node: yaml.Node | None, data: Any, at: str) -> Iterator[Call]:
    """The calls of a mapping and of those in it, in the order of the file."""
    if not isinstance(node, yaml.MappingNode):
        return
    if "_target_" in data:
        yield _call(text, node, data, at)
        return
    for key, value in node.value:
        yield from _calls(text, value, data[key.value], f"{at}.{key.value}".lstrip("."))


def _call(text: str, node: yaml.MappingNode, data: Mapping[str, Any], at: str) -> Call:
    target = config.locate(data["_target_"])
    signature = inspect.signature(target).parameters
    own = target.__module__.startswith("nai_xl.")
    rows = []
    for entry in data.get("defaults", []):  # an option of a group within this one: `/schedule@base: scaled_linear`
        for key, value in entry.items() if isinstance(entry, dict) else ():
            inner, _, name = key.lstrip("/").partition("@")
            rows.append(_row(target, f"{inner}@{at}.{name}", name, value, str(value), f"an option of {inner}"))
    for key, value in node.value:
        if not key.value.startswith("_") and key.value != "defaults":
            written, meaning = _default(text, value), _comment(text, key, value)
            rows.append(_row(target, f"{at}.{key.value}", key.value, data[key.value], written, meaning))
    for name, parameter in signature.items() if own else ():  # others' functions take much that nobody here has tried
        if name not in data and parameter.default is not parameter.empty:
            rows.append(_row(target, f"+{at}.{name}", name, parameter.default, _written(parameter.default), ""))
    says = _first_paragraph(target)
    return Call(data["_target_"], says, _sources(target, says), _members(target) if own else {}, tuple(rows))


def _row(target: Callable[..., Any], key: str, name: str, value: Any, written: str, meaning: str) -> Parameter:
    parameter = inspect.signature(target).parameters.get(name)
    if parameter is None:
        raise UserError(f"{key}: no parameter '{name}' in {target.__name__}")
    default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    made = repr(default) == "<factory>"  # of a dataclass: anew for each
    same = default is parameter.empty or made or default == value or _written(default) == written
    own = "" if same else _written(default)
    return Parameter(key, in_words(hint(target, parameter.annotation)), written, own, meaning)


def _default(text: str, value: yaml.Node) -> str:
    """A value as the yaml has it; of a function named there, its bare name."""
    if isinstance(value, yaml.MappingNode) and value.value:
        named = {key.value: inner.value for key, inner in value.value}
        return str(named.get("_target_", "")).rpartition(".")[2]
    return " ".join(text[value.start_mark.index : value.end_mark.index].split())


def _comment(text: str, key: yaml.Node, value: yaml.Node) -> str:
    """The comment at the end of the line that a value ends in, or its key where the value is a block."""
    end = key.end_mark if isinstance(value, yaml.MappingNode) else value.end_mark
    rest = text.splitlines()[end.line][end.column :]
    return rest.partition("#")[2].strip()


def _written(value: Any) -> str:
    """A Python value as a yaml has it; a function's bare name."""
    if callable(value):
        return value.__name__
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, list | tuple) else str(value)


def _first_paragraph(target: Callable[..., Any]) -> str:
    """Of the docstring; "" for the signature that dataclass writes where there is none."""
    text = inspect.cleandoc(vars(target).get("__doc__") or target.__doc__ or "").split("\n\n")[0]
    return "" if text.startswith(f"{target.__name__}(") else " ".join(text.split())


def _sources(target: Callable[..., Any], says: str) -> dict[str, str]:
    """The papers that a docstring cites as [KEY], as its module's docstring names them."""
    found = {}
    for paragraph in (sys.modules[target.__module__].__doc__ or "").split("\n\n"):
        for key, words in SOURCE.findall(paragraph):
            if f"[{key}]" in says:
                found[key] = " ".join(words.split()).rstrip(".;, ")
    return found


def _members(target: Callable[..., Any]) -> dict[str, bool | float | str]:
    parameters = inspect.signature(target).parameters
    owners = inspect.getmro(target) if inspect.isclass(target) else (target,)
    constants = {
        name: value
        for owner in reversed(owners)
        if owner.__module__.startswith("nai_xl.")
        for name, value in vars(owner).items()
        if isinstance(value, bool | int | float | str)
    }
    return {name: value for name, value in constants.items() if not name.startswith("_") and name not in parameters}
