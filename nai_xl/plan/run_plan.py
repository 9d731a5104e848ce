"""The plan of one combination of choices: its settings, what a step needs, and the canvases of its images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from nai_xl import config
from nai_xl.data.bucketing import assigned
from nai_xl.data.report import within
from nai_xl.engine.gpus import GIB, Gpu
from nai_xl.engine.loop import RunSettings
from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket
from nai_xl.memory.action import MemoryAction
from nai_xl.memory.compatibility import autocast, refuse_misfits
from nai_xl.model.flops import by_area, forward_flops
from nai_xl.plan.footprint import Footprint
from nai_xl.plan.rehearsal import Micro, Rehearsal
from nai_xl.plan.throughput import UTILISATION, Speed, expected

# what is built; nothing else of the config need be there
CHECKED = ("run", "memory", "optimizer", "ema", "bucketing", "precision", "text")
SPARE = 1.0  # GiB that should stay free: other programs' windows, an odd bucket, a newer library


@dataclass(frozen=True)
class Machines:
    """What the command line says about the hardware."""

    gpus: int = 1
    nodes: int = 1
    utilisation: float = UTILISATION
    dollars_per_hour: float | None = None

    @property
    def world(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class RunPlan:
    """One combination: its settings, what a step needs, and the canvases that its images land on, with their number."""

    choices: Mapping[str, str]
    settings: RunSettings
    footprint: Footprint
    worst: Bucket
    canvases: Mapping[Bucket, int]
    from_data: bool
    forward: Mapping[Bucket, int]  # FLOPs of one image
    half: bool  # computes in 16 bits
    ema_on_host: bool
    shards: bool = False  # the engine shares the model out, which the footprint does not take off

    @property
    def images(self) -> int | None:
        """Seen by the run; None for epochs over data that are not here."""
        if self.settings.max_images is not None:
            return self.settings.max_images
        return round((self.settings.epochs or 0) * sum(self.canvases.values())) if self.from_data else None

    def speed(self, gpu: Gpu, machines: Machines) -> Speed | None:
        """Of the mean canvas; None in float32, which no tensor core computes."""
        if not self.half:
            return None
        total = sum(self.canvases.values())
        mean = sum(self.forward[bucket] * count for bucket, count in self.canvases.items()) / total
        return expected(
            replace(self.footprint, flops=int(self.footprint.flops * mean / self.forward[self.worst])),
            gpu,
            batch=self.settings.batch_size,
            grad_accum=self.settings.grad_accum,
            gpus=machines.gpus,
            nodes=machines.nodes,
            utilisation=machines.utilisation,
        )

    def spare(self, gpu: Gpu) -> float:
        """GiB left free on the card; negative when it does not fit."""
        return gpu.memory_gib - self.footprint.needed / GIB


def make(cfg: DictConfig, choices: Mapping[str, str], machines: Machines = Machines()) -> RunPlan:
    """Rehearse the step that a composed config describes. Raises UserError for what could not be trained."""
    config.check(cfg, only=[group for group in CHECKED if group in cfg])
    refuse_unplanned(choices)
    build = functools.partial(config.build, plugins=tuple(cfg.plugins))
    settings: RunSettings = build(cfg.run)
    actions: list[MemoryAction] = [build(node) for node in (cfg.get("memory") or {}).values() if "_target_" in node]
    optimizer = build(cfg.optimizer)
    computed = build(cfg.precision).autocast
    refuse_misfits(actions, optimizer, computed)
    for action in actions:
        action.refuse(grad_accum=settings.grad_accum, precision=computed, world=machines.world)
    canvases, from_data = find_canvases(cfg, build)
    worst = max(canvases, key=lambda bucket: bucket.width * bucket.height)
    skeleton = skeleton_of(cfg.model, tuple(cfg.plugins))
    unet = skeleton()
    on_host = build(cfg.ema, parameters={"weight": nn.Parameter(torch.zeros(1))}).on_host
    rehearsal = Rehearsal(unet, actions, optimizer, None if on_host else build(cfg.ema), settings.max_grad_norm)
    text = build(cfg.text)
    tokens = 77 * text.chunks
    precision = autocast(actions, computed)
    keeps = settings.grad_accum > 1 or machines.world > 1
    footprint = rehearsal.run(Micro(settings.batch_size, worst.height, worst.width, tokens, precision, keeps))
    half = computed != "no" or any(action.weights_in is not None for action in actions)
    if text.in_step and (count := config.member(cfg.model, "text_parameters", tuple(cfg.plugins))):
        footprint = replace(footprint, text_encoders=count() * (2 if half else 4))
    forward = by_area(functools.partial(forward_flops, skeleton(), tokens=tokens), canvases)
    shards = build(cfg.distributed).shards
    return RunPlan(choices, settings, footprint, worst, canvases, from_data, forward, half, on_host, shards)


def refuse_unplanned(choices: Mapping[str, str]) -> None:
    """Raise UserError for another task or adapter: what is rehearsed is the training of a whole UNet."""
    for group, planned in (("task", "text_to_image"), ("adapter", "full")):
        if choices.get(group, planned) != planned:
            raise UserError(f"{group}={choices[group]}: a plan knows {group}={planned} only")


def skeleton_of(model: DictConfig, plugins: tuple[str, ...] = ()) -> Callable[[], Any]:
    """The UNet of a model option without storage. Raises UserError for a model that offers none."""
    skeleton = config.member(model, "skeleton", plugins)
    if skeleton is None:
        raise UserError(f"model: no plan for {model._target_}, which offers no skeleton; there is model=tiny and sdxl")
    found: Callable[[], Any] = skeleton
    return found


def find_canvases(cfg: DictConfig, build: Callable[..., Any]) -> tuple[dict[Bucket, int], bool]:
    """Canvas -> its number of images, and whether a data set said so; without one, each of the bucketing's once.

    Raises UserError for data that are not there.
    """
    bucketing = build(cfg.bucketing)
    folder = None if OmegaConf.is_missing(cfg.data, "dir") else cfg.data.get("dir")
    if folder and "://" not in str(folder) and not Path(folder).is_dir():
        raise UserError(f"data.dir={folder}: no such folder; leave data.dir out to plan without data")
    if any(key in cfg.data and not OmegaConf.is_missing(cfg.data, key) for key in ("dir", "files", "sources")):
        config.check(cfg, only=["data"])
        found = assigned(within(build(cfg.data).scan(), bucketing).items.sizes, bucketing)
        counts = zip(found.buckets, np.bincount(found.of).tolist(), strict=True)
        return dict(sorted(counts, key=lambda pair: -pair[1])), True
    return dict.fromkeys(sorted(bucketing.buckets, key=lambda b: (-b.width * b.height, b)), 1), False
