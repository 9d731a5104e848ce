"""The figure of combinations: noise and loss weight over the timesteps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from nai_xl.errors import UserError
from nai_xl.evals import method_figure
from nai_xl.inspect.combinations import Combination
from nai_xl.task.objective import headline


def save_figure(combinations: Sequence[Combination], path: Path) -> None:
    """Raises UserError when `path` cannot be written or its suffix is not a picture's."""
    swept = list(combinations[0].swept)
    of_group = {name: [key for key in swept if key.split(".")[0] == name] for name in ("schedule", "loss")}
    colour = of_group["schedule"] or (of_group["loss"] if len(swept) > 1 else [])
    style = [key for key in swept if key not in colour]
    arms = [
        method_figure.Variant(c.diagnosis, _values(c, colour), _values(c, style)) for c in combinations if c.diagnosis
    ]
    title = headline(combinations[0].choices, swept)
    image = method_figure.method(arms, title, method_figure.Legend(", ".join(colour), ", ".join(style)))
    try:
        image.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--figure {path} cannot be written ({error}); give another place, such as a .png") from error


def _values(c: Combination, keys: Iterable[str]) -> str:
    """As a legend has them; keys that a listed arm does not have are left out."""
    return ", ".join(c.swept[key] for key in keys if c.swept[key])
