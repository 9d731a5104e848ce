"""The command line of python -m nai_xl.judge."""

from __future__ import annotations

import argparse
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from nai_xl.compare.judging.verdicts import parse_margin
from nai_xl.config import further
from nai_xl.config.schema import did_you_mean
from nai_xl.errors import UserError, keyed

OF_MODELS = ("parameterization", "schedule", "text", "model")  # what one side, or all, are said to be
MODEL = "a run directory, a diffusers folder or a .safetensors file"
OF_ALL = (
    *"data bucketing evals sampling precision native cache plugins output_dir name metrics equivalence".split(),
    *OF_MODELS,
)


@dataclass(frozen=True)
class Side:
    """What is judged as one: the models of one method. `overrides`: what is said of this side alone."""

    name: str
    paths: Sequence[Path]
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Request:
    """What the user asked for; the first side is the baseline. `overrides` hold for all sides."""

    sides: Sequence[Side]
    overrides: Sequence[str] = ()
    metrics: Sequence[str] = ()
    equivalence: str = ""


def arguments(argv: Sequence[str], description: str) -> Request:
    """Raises UserError for fewer than two sides, for what is no setting, and for a pattern that no path matches."""
    parser = argparse.ArgumentParser(prog="python -m nai_xl.judge", description=description)
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="a further folder of config groups")
    parser.add_argument("what", nargs="*", help="models, and settings as nai_xl.train has them")
    given = parser.parse_intermixed_args(argv)
    sides: dict[str, Side] = {}
    settings: list[tuple[str, str]] = []
    for word in given.what:
        key, equals, value = word.partition("=")
        if equals and not Path(word).exists() and (_head(key) in OF_ALL or "." in key):
            settings.append((key, word))
            continue
        named = equals and not Path(word).exists()
        name = key if named else string.ascii_uppercase[len(sides) % 26]
        if name in sides or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(f"{word}: '{name}' cannot be the name of this side; write another: NAME=PATH,PATH")
        sides[name] = Side(name, _paths(value if named else word, name))
    if len(sides) < 2:
        raise UserError(
            "name two models or more, the first being the baseline: python -m nai_xl.judge A B data.dir=DIR"
        )
    return _sorted(sides, settings, [further(given.config_dir)] if given.config_dir else [])


def _sorted(sides: dict[str, Side], settings: Sequence[tuple[str, str]], overrides: list[str]) -> Request:
    """The settings with what they are about: all sides, beside these `overrides`, or one."""
    own: dict[str, str] = {}
    for key, word in settings:
        name, _, rest = key.partition(".")
        if name in sides:
            if _head(rest) not in OF_MODELS:
                raise UserError(
                    f"{key}: of one side alone there is {', '.join(OF_MODELS)}; for all sides set {rest}=..."
                )
            sides[name] = replace(sides[name], overrides=[*sides[name].overrides, word.removeprefix(f"{name}.")])
        elif key in ("metrics", "equivalence"):
            own[key] = word.partition("=")[2]
        elif _head(key) in OF_ALL:
            overrides.append(word)
        else:
            raise UserError(f"no setting or side '{_head(key)}'{did_you_mean(_head(key), [*OF_ALL, *sides])}")
    if equivalence := own.get("equivalence", ""):
        with keyed("equivalence"):
            parse_margin(equivalence)
    metrics = tuple(filter(None, own.get("metrics", "").strip("[]").split(",")))
    return Request(list(sides.values()), overrides, metrics, equivalence)


def _head(key: str) -> str:
    """'evals' of evals.color.seeds, 'schedule' of schedule@schedule.base."""
    return re.split(r"[.@]", key.lstrip("+~"))[0]


def _paths(word: str, name: str) -> list[Path]:
    """The models of the side `name`: paths with commas between them, patterns filled in."""
    found: list[Path] = []
    for part in [word] if Path(word).exists() else filter(None, word.split(",")):
        found += _matching(Path(part)) if set("*?[") & set(part) and not Path(part).exists() else [Path(part)]
    for path in found:
        if not path.exists():
            meant = get_close_matches(name, OF_ALL, n=1, cutoff=0.7)
            hint = f"; did you mean the setting '{meant[0]}'?" if meant else ""
            raise UserError(f"{path}: no such model{hint}; give {MODEL}")
    if not found:
        raise UserError(f"{name}: no model is named; write {name}=PATH,PATH")
    return found


def _matching(pattern: Path) -> list[Path]:
    """What the pattern names, or itself where that is nothing."""
    root = Path(pattern.anchor or ".")
    return sorted(root.glob(str(pattern.relative_to(root)) if pattern.anchor else str(pattern))) or [pattern]
