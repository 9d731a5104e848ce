"""The models that are judged: what each was trained to do, by its own word or by the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.interfaces import Parameterization, Schedule
from nai_xl.judge.arguments import OF_MODELS, Request, Side
from nai_xl.judge.markers import Markers, read_markers

EXAMPLES = {"parameterization": "v, epsilon or sample", "schedule": "ztsnr or scaled_linear"}
BASE = ("model=sdxl", "model.path=''")  # what is said of models is composed on it


@dataclass(frozen=True, eq=False)
class Model:
    """One model of a side, ready to be loaded. row: its seed, or its place in its side."""

    side: str
    path: Path
    row: int
    weights: Path
    configs: Path | None
    parameterization: Parameterization
    schedule: Schedule
    chunks: int
    edge: int
    told: str  # "v_prediction, log-SNR 7.1 to zero (config.yaml)"
    run: DictConfig | None


@dataclass(frozen=True)
class Word:
    """What the user says of one side, or of all: the config that their overrides give, and the groups they name."""

    cfg: DictConfig
    own: frozenset[str]  # groups named for this side alone
    common: frozenset[str]  # groups named for all sides

    @classmethod
    def about(cls, side: Side, request: Request) -> Word:
        common = [word for word in request.overrides if _group(word) in (*OF_MODELS, "plugins", "hydra")]
        cfg = config.compose([*BASE, *common, *side.overrides])
        config.check(cfg, only=("parameterization", "schedule", "text"))
        return cls(cfg, frozenset(map(_group, side.overrides)), frozenset(map(_group, common)))

    @property
    def configs(self) -> Path | None:
        return Path(self.cfg.model.config) if self.cfg.model.config else None

    def built(self, group: str) -> Any:
        return config.build(self.cfg[group], tuple(self.cfg.plugins))


def models(request: Request) -> list[Model]:
    """Every model of every side, the baseline's first. Raises UserError for what cannot be judged; reads no weight."""
    found = _in_rows([list(_of_side(side, request)) for side in request.sides])
    if any(word.startswith("native.resolution=") for word in request.overrides):
        return found
    first = found[0]
    for model in found:
        if model.edge != first.edge:
            raise UserError(
                f"{model.side}: {model.path} is made for canvases of {model.edge} pixels, {first.path} for "
                f"{first.edge}; set native.resolution={first.edge} to judge all models on that"
            )
    return found


def _of_side(side: Side, request: Request) -> Iterator[Model]:
    word = Word.about(side, request)
    for path in side.paths:
        try:
            markers = read_markers(path, word.configs)
        except UserError as error:  # told in terms of a training's config
            text = str(error).replace("model.path=", "").replace("model.config", f"{side.name}.model.config")
            raise UserError(f"{side.name}: {text}") from error
        yield _model(side.name, path, markers, word)


def _model(side: str, path: Path, markers: Markers, word: Word) -> Model:
    parameterization = _settled(
        "parameterization", markers.parameterization, _same_prediction, side, path, markers, word
    )
    said = markers.schedule
    if said is None and not parameterization.defined_at_zero_snr:
        said = markers.curve  # nothing else can be meant
    schedule = _settled("schedule", said, _same_schedule, side, path, markers, word)
    if schedule.zero_terminal and not parameterization.defined_at_zero_snr:
        raise UserError(
            f"{side}: {path} contradicts itself: at zero terminal SNR {parameterization.prediction_type} is undefined; "
            f"set {side}.schedule=scaled_linear or {side}.parameterization=v"
        )
    chunks = markers.run.text.chunks if markers.run and "text" not in word.own else word.built("text").chunks
    flags = [f"{side}.{group}" for group in EXAMPLES if group in word.own]
    flags += [group for group in EXAMPLES if group in word.common and group not in word.own]
    told = f"{parameterization.prediction_type}, {_span(schedule)} ({', '.join([markers.where, *flags])})"
    return Model(
        side,
        path,
        0,
        markers.weights,
        word.configs,
        parameterization,
        schedule,
        chunks,
        markers.edge,
        told,
        markers.run,
    )


def _settled(
    group: str, said: Any, same: Callable[..., bool], side: str, path: Path, markers: Markers, word: Word
) -> Any:
    """What the user says of this side alone; else what the model says; else what the user says of all sides."""
    if group in word.own:
        return word.built(group)
    if said is None and group not in word.common:
        raise UserError(f"{side}: {path} {markers.unclear[group]}; set {side}.{group}=..., {EXAMPLES[group]}")
    if group not in word.common:
        return said
    if said is not None and not same(said, word.built(group)):
        raise UserError(
            f"{side}: {path}: its {markers.where} contradicts {group}=...; set {side}.{group}=... to overrule it, or "
            f"give {group} to the other sides alone, by their names"
        )
    return word.built(group)


def _same_prediction(one: Parameterization, other: Parameterization) -> bool:
    return one.prediction_type == other.prediction_type


def _same_schedule(one: Schedule, other: Schedule) -> bool:
    if len(one) != len(other):
        return False
    every = torch.arange(len(one))
    return torch.allclose(one.at(every).alpha, other.at(every).alpha, atol=1e-6)


def _span(schedule: Schedule) -> str:
    first, last = schedule.at(torch.tensor([0, len(schedule) - 1])).snr.log().tolist()
    return f"log-SNR {first:.1f} to {'zero SNR' if schedule.zero_terminal else f'{last:.1f}'}"


def _group(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]


# --- rows -------------------------------------------------------------------------------------------------------------


def _in_rows(sides: Sequence[Sequence[Model]]) -> list[Model]:
    """Rows are the runs' seeds if all sides have such and share one, else places in the order of the command line."""
    seeds = [_seeds(side) for side in sides]
    shared = set.intersection(*(set(some or ()) for some in seeds))
    rows = [some if shared and some else range(len(side)) for some, side in zip(seeds, sides, strict=True)]
    return [
        replace(model, row=row)
        for side, numbers in zip(sides, rows, strict=True)
        for row, model in sorted(zip(numbers, side, strict=True), key=lambda pair: pair[0])
    ]


def _seeds(side: Sequence[Model]) -> list[int] | None:
    """The seeds of a side whose models are all runs, each with another seed; None for any other."""
    seeds = [int(model.run.run.seed) for model in side if model.run is not None]
    return seeds if len(set(seeds)) == len(side) else None
