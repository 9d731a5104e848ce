"""All that a run is built from, before any weight is read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from nai_xl import config
from nai_xl.adapter.trainable import Adapter, Trainable
from nai_xl.config.build import holds_target
from nai_xl.config.groups import of_several, settings
from nai_xl.data.index import Index, refuse_empty
from nai_xl.data.report import within
from nai_xl.distributed.environment import leave_out
from nai_xl.distributed.launch import refuse_half_a_launch, remarks
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.assemble import State, assemble
from nai_xl.engine.gpus import find
from nai_xl.engine.hooks import ChosenHook
from nai_xl.engine.loop import RunSettings
from nai_xl.engine.meter import Meter
from nai_xl.errors import UserError, keyed
from nai_xl.interfaces import Bucketing, Direction, Evaluator
from nai_xl.memory.action import MemoryAction
from nai_xl.memory.compatibility import autocast, refuse_misfits
from nai_xl.model.finite import refuse_not_finite
from nai_xl.task.objective import compose_objective, groups
from nai_xl.task.task import Task, TrainingData

LATE = ("adapter", "optimizer", "lr", "ema", "tracker", "checkpoint")  # completed by what only a run has


@dataclass(frozen=True)
class Spec:
    """The options of a checked config, built. Making one raises UserError for options that do not go together.

    model reads the weights when it is called; adapter, optimizer, lr, ema, tracker and checkpoint are completed by what
    only a run has.
    """

    cfg: DictConfig
    run: RunSettings
    data: Any
    bucketing: Bucketing
    model: Callable[[], Any]
    task: Task
    adapter: Adapter
    memory: Sequence[MemoryAction]
    optimizer: Callable[..., Any]
    lr: Callable[..., float]
    ema: Callable[..., Any]
    precision: Any
    distributed: Any
    evals: Sequence[Evaluator]
    hooks: Sequence[ChosenHook]
    tracker: Callable[..., Any]
    checkpoint: Callable[..., Any]
    cache: Any

    @classmethod
    def of(cls, cfg: DictConfig) -> Spec:
        parts = Parts(cfg)
        names = [field.name for field in fields(cls) if field.name not in ("cfg", "model", *LATE)]
        model = functools.partial(_loaded, cfg)
        late: dict[str, Any] = {name: _late(name, parts[name]) for name in LATE}
        spec = cls(cfg=cfg, model=model, **{name: parts[name] for name in names}, **late)
        refuse_misfits(spec.memory, parts["optimizer"], spec.precision.autocast)
        spec.distributed.refuse_beside(spec.memory, parts["optimizer"], spec.precision.autocast)
        spec.optimizer(params=[nn.Parameter(torch.zeros(1, 1))])  # refuses its settings before weights are read
        _refuse_long_grids(spec)
        _ = spec.best
        return spec

    @property
    def evaluators(self) -> dict[str, Evaluator]:
        """The evaluators by their names in the config."""
        names = [str(name) for name, node in (self.cfg.get("evals") or {}).items() if "_target_" in node]
        return dict(zip(names, self.evals, strict=True))

    @cached_property
    def best(self) -> tuple[str, Direction, str | None] | None:
        """Of checkpoint.best: the metric, its direction, and which evaluator measures it (None: the training itself).

        Raises UserError for a metric that nothing measures, or that has no good direction.
        """
        metric = self.cfg.checkpoint.get("best")
        if metric is None:
            return None
        declared = [(None, Meter.better), *((name, one.better) for name, one in self.evaluators.items())]
        entries = [(start, better[start], name) for name, better in declared for start in better]
        fitting = [entry for entry in entries if metric.startswith(entry[0])]
        if not fitting:
            raise UserError(
                f"checkpoint.best={metric}: nothing that was chosen measures it and says which values are better. "
                "Choose its evaluator, such as 'evals=[sample_grid,val_loss]' for val/loss, or set checkpoint.best=null"
            )
        _, direction, owner = max(fitting, key=lambda entry: len(entry[0]))
        return metric, direction, owner

    @property
    def compiles(self) -> bool:
        """Whether something is compiled, which had better happen before the clock starts."""
        return any(action.compiles for action in self.memory)

    @property
    def in_backward(self) -> MemoryAction | None:
        """The memory action that updates within the backward pass, if it was chosen."""
        return next((action for action in self.memory if action.updates_in_backward), None)

    def start(self) -> Strategy:
        """Join the other processes. Raises UserError for settings that do not go with so many of them."""
        refuse_half_a_launch(several=config.declared(type(self.distributed), "several", False))
        self.environment({})  # where the caller has not done so, and said it
        precision = self.precision.autocast
        strategy: Strategy = self.distributed.start(autocast(self.memory, precision))
        self.run.chunk_size(strategy.world)
        for action in self.memory:
            action.refuse(grad_accum=self.run.grad_accum, precision=precision, world=strategy.world)
        return strategy

    def environment(self, choices: Mapping[str, str]) -> list[str]:
        """Leave out what accelerate would take from the environment. What to tell of it; choices: group -> option."""

        def asked(key: str) -> list[str]:
            if key in choices:
                return [part.strip() for part in choices[key].strip("[]").split(",")]
            return [str(OmegaConf.select(self.cfg, key))]

        return [*leave_out(asked), *remarks()]

    def scan(self) -> Index:
        """The images. Raises UserError for a model or images that cannot be trained on; no weight is read yet."""
        if check := config.member(self.cfg.model, "check", tuple(self.cfg.plugins)):
            check()
        index = within(self.data.scan(), self.bucketing)
        refuse_empty(index, "data")
        self.task.refuse(index)
        return index

    def assemble(self, trainable: Trainable, strategy: Strategy, data: TrainingData, steps: int) -> State:
        """What the loop steps, before step 0 of a run of `steps` steps."""
        gpu = find(torch.cuda.get_device_name()) if strategy.device.type == "cuda" else None
        meter = Meter(
            self.task.timesteps,
            gather=strategy.gather,
            rank=strategy.rank,
            world=strategy.world,
            refuse_gradients=strategy.scaler is None,
            images_per_step=self.run.images_per_step(strategy.world),
            flops=self.task.flops(data),
            peak_tflops=gpu.bf16_tflops if gpu else None,
        )
        return assemble(
            trainable,
            strategy,
            optimizer=self.optimizer,
            lr=self.lr,
            ema=self.ema,
            meter=meter,
            steps=steps,
            max_grad_norm=self.run.max_grad_norm,
            batch_size=self.run.batch_size,
            grad_accum=self.run.grad_accum,
            free=self.task.free_groups(strategy.device),
            in_backward=self.in_backward is not None,
        )


class Parts(dict[str, Any]):
    """What stands in a config at each key, built when it is first asked for.

    A task is given the groups and nodes that its parameters are named after. A group of which several options can be
    chosen is a list; settings of one that was not chosen are left alone.
    """

    def __init__(self, cfg: DictConfig):
        super().__init__()
        self.cfg, self.plugins = cfg, tuple(cfg.plugins)

    def __missing__(self, key: str) -> Any:
        node: Any = self.cfg.get(key) or {}
        if "_target_" not in node:
            if key not in of_several() and not holds_target(node):
                mended = f"set {key}=OPTION" if key in config.groups() else f"leave out '~{key}'"
                raise UserError(f"{key} is missing; {mended}")
            self[key] = [config.build(one, self.plugins) for one in node.values() if "_target_" in one]
        elif key == "objective":
            choices = {part: self[group] for part, group in groups().items()}
            make = config.build(node, self.plugins)
            self[key] = compose_objective(make, int(self.cfg.native.resolution), **choices)
        elif key == "task":
            self[key] = config.completed(node, self.plugins, **self._asked_for(node))
        else:
            self[key] = config.build(node, self.plugins)
        return self[key]

    def _asked_for(self, node: DictConfig) -> dict[str, Any]:
        """The target's parameters that the node leaves open and the config has."""
        wanted = inspect.signature(config.locate(str(node._target_), self.plugins)).parameters
        known = (*self.cfg, *config.groups(), *settings())
        return {name: self[name] for name in wanted if name not in node and name in known}


def _loaded(cfg: DictConfig) -> Any:
    """The model with its weights. Raises UserError for weights that are not finite, whichever option has read them."""
    components = config.build(cfg.model, tuple(cfg.plugins))
    refuse_not_finite(components)
    return components


def _late(key: str, make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, whose ValueError becomes a UserError that begins with the config key."""

    def called(*args: Any, **given: Any) -> Any:
        with keyed(key):
            return make(*args, **given)

    return called


def _refuse_long_grids(spec: Spec) -> None:
    """Raises UserError for an evaluator that asks for more timesteps than the task's schedule has."""
    for name, evaluator in spec.evaluators.items():
        for setting in config.declared(type(evaluator), "within_schedule", ()):
            count = getattr(evaluator, setting)
            if 0 < spec.task.timesteps < count:
                most = f"must be at most {spec.task.timesteps}, the timesteps of the schedule"
                raise UserError(f"evals.{name}.{setting}={count}: {most}")
