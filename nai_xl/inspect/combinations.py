"""python -m nai_xl.inspect [overrides, with comma-separated values]: what choices of the method do, before training.

Prints a table of all combinations and what is worth knowing of them, and draws a figure. No model and no data are read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nai_xl import config
from nai_xl.diffusion.diagnosis import Diagnosis, diagnose, sentences
from nai_xl.diffusion.objective import Objective
from nai_xl.errors import UserError
from nai_xl.evals import method_figure

GROUP_OF = {"weighting": "loss"}  # parts of an Objective that are not called like their config group


@dataclass
class Combination:
    """One point of the grid: the swept keys' values, and the objective's diagnosis or the reason for its refusal."""

    swept: Mapping[str, str]
    choices: Mapping[str, str]
    diagnosis: Diagnosis | None = None
    sentences: Sequence[str] = ()
    refusal: str = ""


def build_objective(cfg: DictConfig) -> Objective:
    """The objective of a composed config on its native canvas; nothing else of it is looked at. Raises UserError."""
    groups = {part.name: GROUP_OF.get(part.name, part.name) for part in fields(Objective)}
    groups = {name: group for name, group in groups.items() if group in cfg}
    config.check(cfg, only=["native", *groups.values()])
    plugins = tuple(cfg.plugins)
    objective = Objective(**{name: config.build(cfg[group], plugins) for name, group in groups.items()})
    edge = int(cfg.native.resolution)
    return objective.on_canvas(edge, edge)


def inspect(overrides: Sequence[str], config_dir: Path | None = None) -> list[Combination]:
    """Every combination that the overrides span, in their order; run.seed, which changes none of it, makes no other."""
    found: list[Combination] = []
    for with_seed, choices, cfg in config.combinations(overrides, config_dir):
        swept = {key: value for key, value in with_seed.items() if key != "run.seed"}
        if swept in (one.swept for one in found):
            continue
        combination = Combination(swept, choices)
        try:
            objective = build_objective(cfg)
            combination.diagnosis = diagnose(objective)
            combination.sentences = sentences(objective)
        except UserError as error:
            combination.refusal = str(error)
        found.append(combination)
    return found


# --- words ------------------------------------------------------------------------------------------------------------


def headline(choices: Mapping[str, str], swept: Iterable[str] = ()) -> str:
    """The method's choices that are not swept: 'parameterization v, timesteps uniform'."""
    groups = [GROUP_OF.get(part.name, part.name) for part in fields(Objective)]
    return ", ".join(f"{group} {choices[group]}" for group in groups if group in choices and group not in swept)


def table(combinations: Sequence[Combination]) -> Table:
    """A row for each combination: its swept values, then its numbers."""
    choices, swept = combinations[0].choices, combinations[0].swept
    made = Table(
        title=headline(choices, swept),
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1),
        caption="0-, ..., 900-: per cent of the loss weight (weight x density) in each tenth of the timesteps",
        caption_justify="left",
    )
    for key in swept:
        made.add_column(key, style="cyan", no_wrap=True, vertical="bottom")
    length = next((len(c.diagnosis) for c in combinations if c.diagnosis), 0)
    same = all(len(c.diagnosis) == length for c in combinations if c.diagnosis)
    tenths = [f"{-(-length * i // 10)}-" if same else f"{10 * i} %-" for i in range(10)]
    for heading in ("last\nsigma/alpha", "log-SNR\nfrom, to"):
        made.add_column(heading, justify="right", no_wrap=True)
    for heading in tenths:
        made.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for heading in ("last\nweight", "mean\nweight"):
        made.add_column(heading, justify="right", no_wrap=True)
    for c in combinations:
        made.add_row(*map(Text, c.swept.values()), *(numbers(c.diagnosis) if c.diagnosis else ["refused"]))
    return made


def numbers(d: Diagnosis) -> Iterator[str]:
    """The cells of one row."""
    yield f"{d.noise[-1]:.3g}"
    yield f"{d.log_snr[0]:.1f}, {d.log_snr[-1]:.1f}"
    yield from (_percent(float(share)) for share in d.deciles)
    yield f"{d.weight[-1]:.3g}"
    yield f"{d.mean_weight:.3g}"


def _percent(share: float) -> str:
    """Two digits, and no exponents: 12, 3.4, 0.36, 0.01."""
    value = 100 * share
    digits = 0 if value >= 9.95 else 1 if value >= 0.995 else 2
    return "<0.01" if 0 < value < 0.005 else f"{value:.{digits}f}" if value else "0"


def remarks(combinations: Sequence[Combination]) -> Iterator[str]:
    """Each sentence and refusal once, preceded by the combinations it is true of."""
    said = [*(s for c in combinations for s in c.sentences), *(c.refusal for c in combinations if c.refusal)]
    for sentence in dict.fromkeys(said):
        meant = [c.swept for c in combinations if sentence in c.sentences or sentence == c.refusal]
        refused = "refused: " if any(sentence == c.refusal for c in combinations) else ""
        of = described(meant, [c.swept for c in combinations])
        yield f"{of + ': ' if of else ''}{refused}{sentence}"


def described(meant: Sequence[Mapping[str, str]], everything: Sequence[Mapping[str, str]]) -> str:
    """These points of a grid as overrides that select them: 'schedule=ztsnr loss=minsnr,uniform'; '' for all."""
    values = {key: dict.fromkeys(point[key] for point in meant) for key in everything[0]}
    if [point for point in everything if all(point[key] in values[key] for key in values)] != list(meant):
        return "; ".join(" ".join(f"{key}={value}" for key, value in point.items() if value) for point in meant)
    telling = {key: v for key, v in values.items() if set(v) != {point[key] for point in everything}}
    named = {key: [value for value in v if value] for key, v in telling.items()}  # listed arms need not have every key
    return " ".join(f"{key}={','.join(v)}" for key, v in named.items() if v)


# --- figure -----------------------------------------------------------------------------------------------------------


def save_figure(combinations: Sequence[Combination], path: Path) -> None:
    """Raises UserError when `path` cannot be written or has no picture's suffix."""
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


# --- command line -----------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nai_xl.inspect", description=__doc__)
    parser.add_argument("--figure", type=Path, default=Path("inspect.png"), metavar="PATH", help="default: inspect.png")
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="a further folder of config groups")
    parser.add_argument("overrides", nargs="*", help="as for nai_xl.train; a=x,y spans a grid")
    return parser.parse_intermixed_args(argv)


def main() -> None:
    torch.set_num_threads(1)  # small tables: threads cost more than they bring
    given = arguments(sys.argv[1:])
    console = Console(highlight=False, soft_wrap=True)
    with config.mistakes_told():
        combinations = inspect(given.overrides, given.config_dir)
        lines = list(remarks(combinations))
        if all(c.refusal for c in combinations):
            raise UserError("\n".join(lines))
        made = table(combinations)
        # at its natural width, however narrow the terminal or pipe
        Console(highlight=False, width=Console(width=1000).measure(made).maximum).print(made)
        console.print()
        for line in lines:
            console.print(f"- {line}", markup=False)
        save_figure(combinations, given.figure)
        console.print(f"figure: {given.figure}", markup=False)
