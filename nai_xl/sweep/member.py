"""One arm of a sweep: its config, the command that trains it alone, and what has become of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.errors import UserError, one_line
from nai_xl.record.arm import Arm, ArmRecord, arm_so_far, label
from nai_xl.record.metrics import last_value
from nai_xl.record.pace import Pace
from nai_xl.record.run_dir import RunDirectory
from nai_xl.sweep.board import Row
from nai_xl.sweep.processes import Program
from nai_xl.sweep.settings import SweepSettings

Compose = Callable[[Sequence[str]], DictConfig]  # overrides -> an arm's config, as Hydra's sweeper has it

# Hydra's own overrides that are for the sweep and not for its arms
SWEEP_ONLY = ("hydra.mode=", "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweep.")


@dataclass(eq=False)
class Member:
    """One arm of the sweep under way."""

    cfg: DictConfig
    record: ArmRecord
    command: Sequence[str] = ()
    processes: int = 1
    status: str = "not started"
    error: str | None = None
    before: Arm | None = None  # arm.json as the arm's process found it

    @property
    def path(self) -> Path:
        return self.record.home.path

    @property
    def name(self) -> str:
        seed = {"seed": self.record.arm.seed} if "run.seed" in self.cfg.sweep.varied else {}
        return label({**self.record.arm.arm, **seed}) or self.path.name

    def program(self) -> Program:
        return Program(self.command, self.record.home.log, workers=self.processes > 1)

    def row(self, metric: str | None) -> Row:
        """The arm's line in the table of the sweep, with the last value of a metric."""
        arm = arm_so_far(self.path) if self.status != "not started" else None
        steps, seconds = (arm.steps, arm.seconds) if arm else (0, 0.0)
        value = last_value(self.path, metric) if arm and metric else None
        # `python` is what a person types for this program's own, in the environment that is active
        again = shlex.join("python" if part == sys.executable else part for part in self.command)
        return Row(self.name, self.status, steps, seconds, value, self.path, self.error, again)


def member_of(
    module: str, master: DictConfig, composed: DictConfig, settings: SweepSettings, gpus: int, *, place: int
) -> Member:
    """The arm that Hydra composed under `master`, to be trained by `python -m module`. It is FINISHED or FAILED already
    where it has been trained as long as asked for, or its config is refused. place: among the sweep's arms, as typed.
    """
    cfg, choices, overrides = config.opened(composed)
    pace = pace_on(cfg, _processes(cfg, settings, gpus))
    home = RunDirectory(config.run_dir(cfg, choices, pace))
    arm = replace(arm_of(cfg, config.arm(cfg, overrides), pace), place=place)
    member = Member(cfg, ArmRecord(home, arm))
    found = arm_so_far(home.path)
    run = cfg.run
    if found and home.pipeline.is_dir() and found.finished(max_images=run.max_images, epochs=run.epochs):
        member.record.adopt(found)
        member.status = "FINISHED"
        return member
    try:
        config.check(cfg, choices=choices)  # names and types; the arm's own process looks for other mistakes
        member.processes = settings.processes_of(cfg, gpus)
    except UserError as error:
        member.status, member.error = "FAILED", one_line(error)
        member.record.end("FAILED", member.error)
        print(f"error: {member.name}: {member.error}", file=sys.stderr)
    member.command = [*started_by(member.processes), module, *hydra_flags(master), *overrides, f"sweep.place={place}"]
    member.command += ["hydra.mode=RUN"] if choices.get("experiment") else []
    return member


def _processes(cfg: DictConfig, settings: SweepSettings, gpus: int) -> int:
    """How many processes train an arm; 1 for one that is refused."""
    with suppress(UserError):
        return settings.processes_of(cfg, gpus)
    return 1


def pace_on(cfg: DictConfig, processes: int) -> Pace | None:
    """The pace of an arm on so many processes."""
    run: Any = OmegaConf.to_container(cfg.run, resolve=True)
    return config.pace_in(run, processes)


def path_of(composed: DictConfig, settings: SweepSettings, gpus: int) -> Path:
    """The run directory of an arm that Hydra composed."""
    cfg, choices, _ = config.opened(composed)
    return config.run_dir(cfg, choices, pace_on(cfg, _processes(cfg, settings, gpus)))


def arm_of(cfg: DictConfig, arm: Mapping[str, object], pace: Pace | None = None) -> Arm:
    """The arm that a config describes, as its arm.json begins."""
    asked = cfg.sweep
    signature, kin = config.signature(cfg, pace), config.kin(cfg)
    return Arm(asked.name, dict(arm), cfg.run.seed, signature, epochs=cfg.run.epochs, place=asked.place, kin=kin)


def started_by(processes: int) -> list[str]:
    """The beginning of an arm's command."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), "-m"]


def hydra_flags(master: DictConfig) -> list[str]:
    """Hydra's own flags and overrides of the sweep's command line that each arm needs too."""
    hydra = master.hydra
    flags = [] if hydra.job.config_name == "train" else ["--config-name", hydra.job.config_name]
    for source in hydra.runtime.config_sources:
        flags += ["--config-dir", source.path] if source.provider == "command-line" else []
    return flags + [override for override in hydra.overrides.hydra if not override.startswith(SWEEP_ONLY)]


def refuse_shared(members: Sequence[Member]) -> None:
    """Raises UserError for arms that have one run directory and different configs: each would overwrite the other."""
    first: dict[Path, Member] = {}
    for member in members:
        other = first.setdefault(member.path, member)
        if other.cfg != member.cfg:
            raise UserError(
                f"{other.name} and {member.name} are one run, {member.path}: the settings in which they differ do not "
                "change what is learned. To have two, give them names: name='run_${run.max_images}', for example"
            )
