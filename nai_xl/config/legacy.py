"""What version 0.1 wrote, as this version reads it: the targets that have moved since, and the settings of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, open_dict, read_write

from nai_xl.config.trust import trusted
from nai_xl.record.config import read_config
from nai_xl.record.run_dir import RunDirectory

# every target that a yaml of version 0.1 could name and that lies elsewhere now
MOVED = {
    "nai_xl.data.sources.FolderSource": "nai_xl.data.source.folder.FolderSource",
    "nai_xl.data.sources.SampleSource": "nai_xl.data.source.sample.SampleSource",
    "nai_xl.data.sources.ShapesSource": "nai_xl.data.source.shapes.ShapesSource",
    "nai_xl.data.weights.equal": "nai_xl.data.sample_weights.equal",
    "nai_xl.diffusion.pointwise.huber": "nai_xl.diffusion.error.huber",
    "nai_xl.diffusion.pointwise.mse": "nai_xl.diffusion.error.mse",
    "nai_xl.diffusion.pointwise.scheduled_huber": "nai_xl.diffusion.error.scheduled_huber",
    "nai_xl.diffusion.pointwise.smooth_l1": "nai_xl.diffusion.error.smooth_l1",
    "nai_xl.diffusion.uncertainty.Uncertainty": "nai_xl.diffusion.loss.Uncertainty",
    "nai_xl.engine.distributed.DataParallel": "nai_xl.distributed.ddp.Ddp",
    "nai_xl.engine.distributed.SingleProcess": "nai_xl.distributed.none.SingleProcess",
    "nai_xl.engine.ema.NoEma": "nai_xl.optimizer.ema.NoEma",
    "nai_xl.engine.ema.StandardEma": "nai_xl.optimizer.ema.StandardEma",
    "nai_xl.engine.memory.attention.AttentionSlicing": "nai_xl.memory.attention.AttentionSlicing",
    "nai_xl.engine.memory.attention.Sdpa": "nai_xl.memory.attention.Sdpa",
    "nai_xl.engine.memory.checkpointing.GradientCheckpointing": (
        "nai_xl.memory.gradient_checkpointing.GradientCheckpointing"
    ),
    "nai_xl.engine.memory.compiled.ActivationBudget": "nai_xl.memory.activation_budget.ActivationBudget",
    "nai_xl.engine.memory.compiled.Compile": "nai_xl.memory.compile.Compile",
    "nai_xl.engine.memory.layout.ChannelsLast": "nai_xl.memory.channels_last.ChannelsLast",
    "nai_xl.engine.memory.offload.OffloadActivations": "nai_xl.memory.offload_activations.OffloadActivations",
    "nai_xl.engine.memory.precision.Bf16Weights": "nai_xl.memory.bf16_weights.Bf16Weights",
    "nai_xl.engine.memory.precision.Fp8FeedForward": "nai_xl.memory.fp8_ff.Fp8FeedForward",
    "nai_xl.engine.memory.precision.Tf32": "nai_xl.memory.tf32.Tf32",
    "nai_xl.engine.optimizer.constant": "nai_xl.optimizer.lr.constant",
    "nai_xl.engine.optimizer.cosine": "nai_xl.optimizer.lr.cosine",
    "nai_xl.engine.optimizer.linear": "nai_xl.optimizer.lr.linear",
    "nai_xl.engine.optimizers.adafactor.Adafactor": "nai_xl.optimizer.adafactor.Adafactor",
    "nai_xl.engine.optimizers.adamw_8bit.AdamW8bit": "nai_xl.optimizer.adamw8bit.AdamW8bit",
    "nai_xl.engine.optimizers.adamw_bf16.AdamWBf16": "nai_xl.optimizer.adamw_bf16.AdamWBf16",
    "nai_xl.engine.update.OptimizerInBackward": "nai_xl.memory.optimizer_in_backward.OptimizerInBackward",
    "nai_xl.model.random.sdxl_random": "nai_xl.model.sdxl_random.sdxl_random",
    "nai_xl.report.evals.coherence.Coherence": "nai_xl.evals.coherence.Coherence",
    "nai_xl.report.evals.color.Color": "nai_xl.evals.color.Color",
    "nai_xl.report.evals.quality.Quality": "nai_xl.evals.quality.Quality",
    "nai_xl.report.evals.val_loss.ValLoss": "nai_xl.evals.val_loss.ValLoss",
    "nai_xl.report.evaluate.SampleGrid": "nai_xl.evals.sample_grid.SampleGrid",
    "nai_xl.report.mlflow_tracker.MlflowTracker": "nai_xl.tracker.mlflow.tracker.MlflowTracker",
    "nai_xl.report.profile.Profiler": "nai_xl.profiler.profiler.Profiler",
    "nai_xl.report.tracking.JsonlTracker": "nai_xl.tracker.jsonl.JsonlTracker",
    "nai_xl.sweep.SweepSettings": "nai_xl.sweep.settings.SweepSettings",
    "nai_xl.types.Native": "nai_xl.interfaces.Native",
}
# groups that are newer than some runs -> what those runs did without them
ADDED: Mapping[str, Mapping[str, Any]] = {
    "adapter": {"_target_": "nai_xl.adapter.full.full", "_partial_": True},
    "task": {"_target_": "nai_xl.task.text_to_image.TextToImage", "_partial_": True},
}
OPTIONS_OF_ADDED = {"adapter": "full", "task": "text_to_image"}
# overrides that continue runs of earlier versions: what they were begun with, where conf/ has something else today
FORMER: Mapping[str, Mapping[str, Any]] = {
    "bucketing.scheme=half": {"bucketing": {"scheme": "half"}},
    "text=cached": {"text": {"_target_": "nai_xl.model.text.TextEncoding"}},
}
PRECISION = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # run.mixed_precision -> option of the group precision


def moved(target: str) -> str:
    """Where the target lies now."""
    return MOVED.get(target, target)


def upgraded(stored: DictConfig, plugins: Sequence[str] | None = None) -> DictConfig:
    """A run's stored config, whichever version wrote it, as this version would have written it; `plugins` as for
    stored_config.
    """
    cfg = stored.copy()
    with read_write(cfg), open_dict(cfg):
        if "plugins" in cfg:
            cfg.plugins = trusted(cfg, plugins)
        for node in _nodes(cfg):
            node._target_ = moved(str(node._target_))
        if "mixed_precision" in (cfg.get("run") or {}):
            autocast = cfg.run.pop("mixed_precision")
            cfg.precision = {"_target_": "nai_xl.distributed.precision.MixedPrecision", "autocast": autocast}
        for group, before in ADDED.items():
            if group not in cfg:
                cfg[group] = before
    return cfg


def upgraded_choices(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a run noted in params.json, with the options of groups that are newer than it."""
    values = dict(stored)
    if "run.mixed_precision" in values:
        precision = values.pop("run.mixed_precision")
        values |= {"precision": PRECISION.get(precision, precision), "precision.autocast": precision}
    return {**OPTIONS_OF_ADDED, **values} if values else {}


def stored_config(run_dir: Path, plugins: Sequence[str] | None = None) -> DictConfig:
    """The config that a run was trained with, in terms of this version. Of its plug-ins it has those among `plugins`,
    by default those that this program's user has typed.

    Raises FileNotFoundError where there is none, and UserError where it is no config.
    """
    stored = read_config(run_dir)
    if stored is None:
        raise FileNotFoundError(RunDirectory(run_dir).config)
    return upgraded(stored, plugins)


def made_by_0_1(run_dir: Path) -> bool:
    """Whether 0.1 wrote the run's config.yaml: it alone had a setting run.mixed_precision. The yaml is not parsed."""
    try:
        return "\n  mixed_precision:" in (run_dir / "config.yaml").read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return False


def _nodes(node: Any) -> Iterator[DictConfig]:
    """Every node that names a target, at any depth."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for key in node:
            yield from _nodes(node._get_node(key))
    if isinstance(node, ListConfig):
        for i in range(len(node)):
            yield from _nodes(node._get_node(i))
