"""The catalogue as Markdown: a page for each group, and the tables for README.md and docs/config.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nai_xl.docs.catalogue import Call, Group, Option, Parameter

MARKUP = re.compile(r"[*~]|\b_|_\b|(?<!\w)_")  # an underscore within a word is none
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")

MEMBERS = {  # of the classes, by which options say how they behave: those that a user chooses by
    "tolerance": "the largest relative change of a step's loss, in float32, that it may cause",
    "stochastic_rounding": "whether bfloat16 weights are rounded so that they learn",
    "open_ended": "whether a longer run continues a shorter one",
    "defined_at_zero_snr": "whether it has a meaning on a schedule that ends at zero SNR",
    "several": "whether it can use more than one process",
    "looks_at": "the task whose model it looks at",
}


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
    """The options, with a column for each of MEMBERS that one of them has."""
    members = [{name: value for call in o.calls for name, value in call.members.items()} for o in group.options]
    names = [name for name in MEMBERS if any(name in found for found in members)]
    rows = (
        [f"[{option.name}](#{option.name})", prose(option.description), *(_shown(found.get(name)) for name in names)]
        for option, found in zip(group.options, members, strict=True)
    )
    parts = [_table(["option", "", *(f"`{name}`" for name in names)], rows)]
    parts += [f"`{name}`: {MEMBERS[name]}." for name in names]
    if all(option.calls and all(map(_harmless, option.calls)) for option in group.options):
        parts.append("The choice does not change the trained weights, and is no part of what a run is.")
    return "\n\n".join(parts)


def _harmless(call: Call) -> bool:
    return call.members.get("changes_weights") is False


def _section(group: str, option: Option) -> str:
    says = f"{option.description}." if option.description[-1].isalnum() else option.description
    parts = [f"## {option.name}", prose(says), prose(option.remarks)]
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
    return f"{value:.0e}".replace("e-0", "e-") if isinstance(value, float) and value else str(value).removesuffix(".0")


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
