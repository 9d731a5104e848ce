"""Every combination of some overrides, with what its objective does or why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from nai_xl import config
from nai_xl.diffusion.diagnosis import Diagnosis, diagnose, sentences
from nai_xl.diffusion.objective import Objective
from nai_xl.errors import UserError
from nai_xl.task.objective import compose_objective, groups


@dataclass
class Combination:
    """One point of the grid: the swept keys' values, and the objective's diagnosis or the reason for its refusal.

    choices: config group -> option, for every group.
    """

    swept: Mapping[str, str]
    choices: Mapping[str, str]
    diagnosis: Diagnosis | None = None
    sentences: Sequence[str] = ()
    refusal: str = ""


def build_objective(cfg: DictConfig) -> Objective:
    """The objective of a composed config on its native canvas; nothing else of it is looked at. Raises UserError."""
    chosen = {name: group for name, group in groups().items() if group in cfg}
    config.check(cfg, only=["native", "objective", *chosen.values()])
    plugins = tuple(cfg.plugins)
    parts = {name: config.build(cfg[group], plugins) for name, group in chosen.items()}
    edge = int(cfg.native.resolution)
    return compose_objective(config.build(cfg.objective, plugins), edge, **parts).on_canvas(edge, edge)


def inspect(overrides: Sequence[str], config_dir: Path | None = None) -> list[Combination]:
    """Every combination that the overrides span, in their order. Those that differ in run.seed alone are one."""
    found: list[Combination] = []
    for swept, choices, cfg in config.combinations(overrides, config_dir, first_of=["run.seed"]):
        combination = Combination(swept, choices)
        try:
            objective = build_objective(cfg)
            combination.diagnosis = diagnose(objective)
            combination.sentences = sentences(objective, int(cfg.native.resolution))
        except UserError as error:
            combination.refusal = str(error)
        found.append(combination)
    return found
