"""The objective from its built choices, and its refusals in the words of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from nai_xl.diffusion.objective import Misfit, Objective
from nai_xl.errors import ChoiceError, UserError, one_line, under

# fields of Objective that are not called like the config key that sets them
KEYS = {
    "weighting": "loss",
    "normalize_weights": "objective.normalize_weights",
    "micro_conditioning": "objective.micro_conditioning",
}
CURES = {
    "parameterization": ". Use parameterization=v, or schedule=scaled_linear.",
    "normalize_weights": "; set objective.normalize_weights=false",
    "weighting": "; use loss=uniform, or schedule=scaled_linear if only a terminal SNR of zero is at fault",
    "error": "; use error=mse, or schedule=scaled_linear if only a terminal SNR of zero is at fault",
}


def config_key(choice: str) -> str:
    """The config key of a field of Objective: its config group, or a setting below `objective`."""
    return KEYS.get(choice, choice)


def groups() -> dict[str, str]:
    """Field of Objective -> config group, for the fields that a group chooses."""
    keys = {part.name: config_key(part.name) for part in fields(Objective) if part.init}
    return {name: key for name, key in keys.items() if "." not in key}


def compose_objective(make: Callable[..., Objective], edge: int, **choices: Any) -> Objective:
    """`make(**choices)`, for instance a functools.partial of Objective with its settings.

    Raises UserError, with the overrides that help, for choices that make no objective or none on the square canvas of
    `edge` pixels.
    """
    try:
        made = make(**choices)
        made.on_canvas(edge, edge)
    except Misfit as error:
        raise UserError(error.told(config_key(error.choice)) + CURES[error.choice]) from error
    except ChoiceError as error:
        raise UserError(error.told(config_key(error.choice))) from error
    except ValueError as error:
        raise UserError(under("objective", one_line(error))) from error
    return made


def headline(choices: Mapping[str, str], swept: Iterable[str] = ()) -> str:
    """The method's choices that are not swept: 'parameterization v, timesteps uniform'. choices: group -> option."""
    named = [group for group in groups().values() if group in choices and group not in swept]
    return ", ".join(f"{group} {choices[group]}" for group in named)
