"""New questions to a finished run: evaluators look at it as they would have done at its end."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, open_dict

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.errors import UserError, keyed
from nai_xl.memory import process_wide
from nai_xl.memory.compile import uncompiled
from nai_xl.record.items import add_items
from nai_xl.record.journal import metrics_of, now
from nai_xl.record.run_dir import RunDirectory
from nai_xl.tracker.jsonl import NoTracker


def config_of(run: Path, overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The config that `run` was trained with, with the evaluators that `overrides` choose in place of its own.

    `config_dir`: a further folder of config groups.

    Raises UserError for a folder that is no run, and for overrides of anything but evals.
    """
    allowed = ("evals=", "evals.", "plugins=")
    if other := [word for word in overrides if not word.lstrip("+~").startswith(allowed)]:
        raise UserError(f"{other[0]}: a finished run has its settings; only evals=[...] and evals.*=... can be given")
    try:
        cfg = config.stored_config(run, config.typed_plugins(overrides))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{run}: no run here (no config.yaml); give a folder that nai_xl.train has made") from error
    with open_dict(cfg):
        cfg.distributed = config.compose(["distributed=none"]).distributed  # one process looks, however many trained
        asked = config.compose([*overrides, *([config.further(config_dir)] if config_dir else [])])
        cfg.evals, cfg.plugins = asked.evals, asked.plugins
    config.check(cfg)
    return cfg


def evaluate(run: Path, cfg: DictConfig) -> dict[str, float]:
    """Metric -> value of the evaluators of `cfg`, by the averaged weights of the newest checkpoint.

    They are added to the run's metrics.jsonl and items/ at that step, where later values replace earlier ones; nothing
    else of the run is changed. Raises UserError for a run that is not finished, and if its images have changed since.
    """
    home = RunDirectory(run)
    if not home.pipeline.is_dir():
        raise UserError(f"{run} is not finished: it holds no pipeline yet; train it to its end first")
    with home.locked(), process_wide.restored(), tempfile.TemporaryDirectory() as aside:
        step, values = _looked_at(Spec.of(cfg), home, Path(aside))
        add_items(Path(aside), run)
        metrics = metrics_of(run)
        metrics.mend()
        metrics.append(step=step, time=now(), **values)
    return values


def _looked_at(spec: Spec, home: RunDirectory, aside: Path) -> tuple[int, dict[str, float]]:
    """The step of the newest checkpoint, and what the evaluators say; single items are written to `aside`."""
    strategy = spec.start()
    index = spec.scan()
    checkpoints = spec.checkpoint(dir=home.checkpoints, keep=spec.run.keep_checkpoints, strategy=strategy)
    if not checkpoints.latest_step():
        raise UserError(f"{home.checkpoints} holds no checkpoint, and the averaged weights are read from there")
    network = spec.task.load(spec.model)
    data = spec.task.prepare(index, spec.cache, strategy, home)
    home.claim_data(data.index.fingerprint(), len(data.index.items))
    trainable = spec.adapter(network)
    for action in spec.memory:
        action.apply(trainable.module)
    state = spec.assemble(trainable, strategy, data, spec.run.steps(len(index.items), strategy.world))
    kept = state.stateful()
    checkpoints.bind(unet=kept["unet"], ema=kept["ema"], **spec.task.stateful())
    step = checkpoints.load_latest()
    if checkpoints.remarks:
        raise UserError(f"{'; '.join(checkpoints.remarks)}. Train the run to its end again: its own command goes on")
    studio = replace(spec.task.studio(data, state, NoTracker(), home), run_dir=aside)
    values: dict[str, float] = {}
    with checkpoints, uncompiled(spec.memory), keyed("evals"):
        for evaluator in spec.evals:
            values |= evaluator.run(step, studio)
    return step, values
