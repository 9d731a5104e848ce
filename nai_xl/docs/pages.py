"""The catalogue as Markdown: a page for each group, and the tables for README.md and docs/config.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nai_xl.docs.catalogue import Call, Group, Option, Parameter

MARKUP = re.compile(r"[*~]|\b_|_\b|(?<!\w)_")  # an underscore within a word is none
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")


def summary(groups: Sequence[Group], folder: str) -> str:
    """A row for each group: its sentence and its options, the default first. `folder` is the way to docs/groups."""
    rows = ((f"[{group.name}]({folder}/{group.name}.md)", group.decides, _choices(group)) for group in groups)
    return _table(["group", "what it decides", "options, the default first"], rows)


def page(group: Group) -> str:
    """docs/groups/<group>.md"""
    parts = [
        f"<!-- Written by `python -m nai_xl.docs` from conf/{group.name} and what it names: change those. -->",
        f"# {group.name}",
        f"{group.decides[0].upper()}{group.decides[1:]}.",
        _how_to_choose(group),
        _overview(group),
        *(_section(group.name, option) for option in group.options),
    ]
    return "\n\n".join(parts) + "\n"


def _choices(group: Group) -> str:
    names = [option.name for option in group.options]
    defaults = [f"**{name}**" for name in names if name in group.defaults]
    return ", ".join([*defaults, *(name for name in names if name not in group.defaults)])


def _how_to_choose(group: Group) -> str:
    if group.several:
        two = ",".join([*group.defaults, *(o.name for o in group.options if o.name not in group.defaults)][:2])
        return f"Several at once: `'{group.name}=[{two}]'`. The default is `{group.name}=[{','.join(group.defaults)}]`."
    if group.defaults:
        return f"`{group.name}={group.defaults[0]}` is the default."
    return f"None is chosen unless you name one: `{group.name}={group.options[0].name}`."


def _overview(group: Group) -> str:
    """The options, with a column for each number or switch by which they tell how they behave."""
    members = [{n: v for call in o.calls for n, v in call.members.items() if v is not str(v)} for o in group.options]
    names = list(dict.fromkeys(name for found in members for name in found))
    rows = (
        [f"[{option.name}](#{option.name})", prose(option.description), *(_shown(found.get(name)) for name in names)]
        for option, found in zip(group.options, members, strict=True)
    )
    return _table(["option", "", *(f"`{name}`" for name in names)], rows)


def _section(group: str, option: Option) -> str:
    parts = [f"## {option.name}", f"{prose(option.description)}.".replace("?.", "?"), prose(option.remarks)]
    if not option.calls:
        parts.append(f"```yaml\n# conf/{group}/{option.name}.yaml\n{option.text.strip()}\n```")
    parts += [_call(call) for call in option.calls]
    return "\n\n".join(filter(None, parts))


def _call(call: Call) -> str:
    sources = "".join(f" [{key}] {prose(words)}." for key, words in call.sources.items())
    parts = [f"`{call.target}`: {prose(call.says)}{sources}" if call.says else f"`{call.target}`"]
    if call.parameters:
        rows = ([f"`{p.key}`", p.type, _defaults(p), prose(p.meaning)] for p in call.parameters)
        parts.append(_table(["parameter", "type", "default", "meaning"], rows))
    return "\n\n".join(parts)


def _defaults(parameter: Parameter) -> str:
    written = "to be given" if parameter.default == "???" else f"`{parameter.default}`"
    return f"{written} (in Python `{parameter.own}`)" if parameter.own else written


def _shown(value: bool | float | str | None) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def prose(text: str) -> str:
    """A docstring's text in Markdown: arXiv numbers are links, and nothing outside backticks is markup."""
    parts = text.split("`")
    parts[::2] = [
        ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", MARKUP.sub(r"\\\g<0>", part).replace("<", "&lt;"))
        for part in parts[::2]
    ]
    return "`".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
