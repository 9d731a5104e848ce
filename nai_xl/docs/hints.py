"""Types as a person types them: `Annotated[int, Field(ge=1)] | None` is "int ≥ 1, or null"."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from torch import Tensor

LIMITS = {"ge": "≥ ", "gt": "> ", "le": "≤ ", "lt": "< ", "multiple_of": "multiple of "}


def hint(target: Callable[..., Any], annotation: Any) -> Any:
    """The type that an annotation of `target`'s signature stands for; None where it has none.

    Each annotation is evaluated by itself, in the modules of the class and its bases. Text that names something
    imported for type checkers alone stays text.
    """
    if annotation is inspect.Parameter.empty:
        return None
    if not isinstance(annotation, str):
        return annotation
    for owner in inspect.getmro(target) if inspect.isclass(target) else (target,):
        try:
            return eval(annotation, vars(sys.modules[owner.__module__]))  # noqa: S307 - code of a trusted package
        except NameError:
            continue
    return annotation


def in_words(hint: Any) -> str:
    """A type in a few words, "" for None. A tensor that torch takes in place of a number is left out."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is None or isinstance(hint, str):
        return hint or ""
    if origin is Annotated:
        return " ".join(filter(None, [in_words(parts[0]), ", ".join(_limits(parts[1:]))]))
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, UnionType):
        several = " or ".join(in_words(part) for part in parts if part not in (NoneType, Tensor))
        return f"{several}, or null" if NoneType in parts else several
    if origin is Callable:
        return "function"
    if origin is tuple and Ellipsis not in parts:
        return f"list of {len(parts)} {in_words(parts[0])}"
    if origin is Mapping:
        return f"names with {in_words(parts[1])}"
    if parts and isinstance(origin, type):
        return f"list of {in_words(parts[0])}"
    if hint is Any:
        return "any"
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    return {"Path": "path", "str": "text"}.get(name, name)


def _limits(metadata: tuple[Any, ...]) -> Iterator[str]:
    """What pydantic's Field says of a number's range; validators of the package's own speak when they refuse."""
    for item in metadata:
        for limit in item.metadata if isinstance(item, FieldInfo) else [item]:
            yield from (f"{words}{getattr(limit, name):g}" for name, words in LIMITS.items() if hasattr(limit, name))
