"""python -m nai_xl.train [group=option ...] [key=value ...]: train one run, or continue it."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.engine.console import Screen
from nai_xl.engine.stop import Stop
from nai_xl.errors import UserError
from nai_xl.memory import process_wide
from nai_xl.model.quiet import quiet_libraries
from nai_xl.record.arm import ArmRecord, arm_so_far
from nai_xl.record.metrics import objective
from nai_xl.record.run_dir import RunDirectory
from nai_xl.sweep.launch import Sweep
from nai_xl.sweep.member import arm_of
from nai_xl.training.drift import begun_anew
from nai_xl.training.processes import decline_restart, heartbeat, held
from nai_xl.training.session import Session


def train(cfg: DictConfig, choices: Mapping[str, str], arm: Mapping[str, Any] | None = None) -> Path:
    """Train the run that a checked config describes, or continue it. Returns its directory.

    choices: group -> option. arm: the values that a sweep gave the keys that it varies.
    """
    cfg = begun_anew(cfg, choices)
    spec = Spec.of(cfg)
    home = RunDirectory(config.run_dir(cfg, choices))
    with Stop() as stop, ArmRecord(home, arm_of(cfg, arm or {})) as note, process_wide.restored():
        home.create()
        decline_restart(note.stopped_at())
        environment = spec.environment(choices)
        strategy = spec.start()
        with heartbeat(spec, strategy, stop, note.end_now):
            session = Session(spec, choices, home, strategy, note, stop, environment)
            index = spec.scan()  # what can be known without the weights has been refused by now
            with held(home) if strategy.first else nullcontext():
                session.run(index)
    return home.path


def main_job(cfg: DictConfig, choices: dict[str, str]) -> float | None:
    """Train; the run's last val/loss, or else train/loss, for a search to minimise."""
    quiet_libraries()
    home = train(cfg, choices, config.arm(cfg))
    gc.collect()  # a sweep's next arm may be trained in this process, and must not find this one's model in memory
    return objective(home)


def needless(cfg: DictConfig, choices: dict[str, str], error: UserError) -> bool:
    """Whether the error is about the images of a run that is finished, and needs them no more. Says so."""
    home = RunDirectory(config.run_dir(cfg, choices))
    found = arm_so_far(home.path)
    of_data = all(line.startswith(("data:", "data.")) for line in str(error).splitlines())
    if not of_data or found is None or not home.pipeline.is_dir():
        return False
    if finished := found.finished(max_images=cfg.run.max_images, epochs=cfg.run.epochs):
        Screen(silent=False).say(
            f"finished: this run has {found.steps} steps; its images are not there any more ({error})",
            f"pipeline     {home.pipeline}",
        )
    return finished


main = config.entry_point(main_job, sweep=Sweep("nai_xl.train"), needless=needless)

if __name__ == "__main__":
    main()
