"""distributed=deepspeed_zero2 and deepspeed_zero3: DeepSpeed's ZeRO, whose settings are written from ours.

deepspeed.initialize is called directly: accelerate's DeepSpeedPlugin is ignored on a CPU, steps inside the backward
pass, and remembers itself in the environment.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nai_xl.distributed.alone import process_group
from nai_xl.distributed.plain import become, row_major, structure_of
from nai_xl.distributed.start import joined
from nai_xl.distributed.strategy import (
    TIMEOUT,
    Engine,
    MakeOptimizer,
    Minutes,
    Parameters,
    Ranks,
    StepSettings,
    Strategy,
    Wrapped,
)
from nai_xl.distributed.zero_state import Partitioned, ZeroOptimizer, ZeroWeights
from nai_xl.errors import UserError
from nai_xl.interfaces import Ema, Precision, Stateful
from nai_xl.memory import process_wide
from nai_xl.memory.action import MemoryAction
from nai_xl.optimizer.part import needs_whole_tensors


@dataclass(frozen=True)
class DeepSpeed(Engine):
    """ZeRO; Rajbhandari et al., 1910.02054. Stage 2 shares out moments and gradients, stage 3 weights as well.

    Micro-batch, accumulation and clipping are run.*'s, and nothing else can be set. Weights are float32, cast by
    autocast where precision says so, as with every engine, so that losses agree; DeepSpeed's own half precision is not
    used. Gradients are exchanged after every micro-batch, since no process keeps a whole gradient. At the start the
    whole model is on every device for a moment.

    timeout: minutes that a process may be silent, or all of them without progress, until the run ends.
    """

    several: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    stage: Literal[2, 3] = 2
    timeout: Minutes = TIMEOUT

    def refuse_beside(
        self, actions: Sequence[MemoryAction], optimizer: Callable[..., Any], precision: Precision
    ) -> None:
        name = f"distributed=deepspeed_zero{self.stage}"
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(f"{name} needs DeepSpeed; pip install deepspeed, or set distributed=fsdp2")
        if precision == "fp16":
            raise UserError(f"{name} is used without a loss scaler; set precision=bf16, or distributed=ddp")
        for action in actions:
            if reason := self._against(action):
                key = action.key
                raise UserError(f"memory: {key} {reason} {name}; set '~memory.{key}', or distributed=fsdp2")
        kind = getattr(optimizer, "func", optimizer)
        if needs_whole_tensors(optimizer) or getattr(kind, "per_block", {}):
            raise UserError(
                f"optimizer: {kind.__name__} does not work element by element, and {name} cuts through tensors; set "
                "optimizer=adamw, or distributed=ddp"
            )

    def _against(self, action: MemoryAction) -> str | None:
        if action.updates_in_backward:
            return "updates before gradients are exchanged, which is not possible with"
        if action.weights_in is not None:
            return "rounds weights stochastically, of which there are float32 copies with"
        if action.replaces_products:
            return "has not been tried with"
        if action.compiles and self.stage == 3:
            return "cannot compile what collects weights in"
        return None

    def start(self, precision: Precision) -> Strategy:
        group = joined(precision, self.timeout)
        process_group(group.device.type)
        if "LOCAL_RANK" not in os.environ:  # DeepSpeed reads it, also where no launcher has put it there
            os.environ["LOCAL_RANK"] = "0"
            process_wide.afterwards(lambda: os.environ.pop("LOCAL_RANK", None))
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        return (Zero2 if self.stage == 2 else Zero3)(group)


@dataclass
class Zero2(Ranks):
    """Whole weights on every process, moments and gradients shared out."""

    stage: ClassVar[int] = 2
    scaler: None = None
    engine: Any = field(default=None, init=False)

    def config(self, settings: StepSettings) -> dict[str, Any]:
        """DeepSpeed's settings, all from ours."""
        return {
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_accumulation_steps": settings.grad_accum,
            "gradient_clipping": settings.max_grad_norm,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,  # element by element, which refuse_beside sees to
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }

    def wrap(
        self, module: nn.Module, parameters: Parameters, make: MakeOptimizer | None, settings: StepSettings
    ) -> Wrapped:
        assert make is not None, "refuse_beside has refused what updates without an optimizer of its own"
        row_major(module)
        self.module, self.parameters = module, parameters
        inner = make(parameters)
        ours = {id(p) for p in parameters.values()}
        if any(id(p) not in ours for group in inner.param_groups for p in group["params"]):
            raise UserError(
                "loss: a learned weighting is trained beside the network, which "
                f"distributed=deepspeed_zero{self.stage} cannot; set loss=minsnr, or distributed=fsdp2"
            )
        self.groups = [list(group["params"]) for group in inner.param_groups]
        self.accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)  # autocast alone
        deepspeed = importlib.import_module("deepspeed")  # an optional dependency, slow to import
        # DeepSpeed keeps its copy of the group of all processes, which may be that of an earlier run, and closed
        process_wide.change(importlib.import_module("deepspeed.utils.groups"), "_WORLD_GROUP", None)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=inner, config=self.config(settings))
        self.inner = inner
        return Wrapped(self.engine, parameters, inner, self.update)

    def update(self) -> Tensor:
        """Clip, step and drop the gradients: DeepSpeed leaves out a step whose norm is not finite, on every rank."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    @contextmanager
    def accumulating(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)  # the loop has divided it already

    def rehearse(self, module: nn.Module, loss: Callable[[], Tensor], parameter: nn.Parameter) -> None:
        """Nothing: a backward pass here would leave gradients behind. The first steps compile."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError("DeepSpeed takes the norm within its step")

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        raise NotImplementedError("DeepSpeed clips within its step")

    # --- state, by parameter ------------------------------------------------------------------------------------------

    def make_state(self) -> None:
        """The inner optimizer's state as after a first step, which moves nothing: torch makes it then."""
        rates = [group["lr"] for group in self.inner.param_groups]
        for group in self.inner.param_groups:
            group["lr"] = 0.0
        for number, flat in enumerate(self.flats()):
            flat.grad = torch.zeros_like(flat)
            self.engine.optimizer._optimizer_step(number)
            flat.grad = None
        for group, rate in zip(self.inner.param_groups, rates, strict=True):
            group["lr"] = rate

    def flats(self) -> list[Tensor]:
        """The pieces that the inner optimizer moves."""
        found: list[Tensor] = self.engine.optimizer.single_partition_of_fp32_groups
        return found

    def set_weight(self, p: nn.Parameter, value: Tensor) -> None:
        p.data.copy_(value)
        importlib.import_module("deepspeed.utils").safe_set_full_fp32_param(p, value)

    def set_state(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        importlib.import_module("deepspeed.utils").safe_set_full_optimizer_state(p, value, key)

    def stateful(self, parameters: Parameters, optimizer: Any, ema: Ema) -> dict[str, Stateful]:
        return {
            "weights": ZeroWeights(self, parameters),
            "ema": ema,
            "optimizer": ZeroOptimizer(self),
        }


@dataclass
class Zero3(Zero2):
    """Weights, moments and gradients shared out; a layer's weights are collected when it computes."""

    stage: ClassVar[int] = 3
    lockstep: ClassVar[bool] = True

    def config(self, settings: StepSettings) -> dict[str, Any]:
        found = super().config(settings)
        # none stays collected for good: an evaluation swaps averages into the parts, and all must see them
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    def wrap(
        self, module: nn.Module, parameters: Parameters, make: MakeOptimizer | None, settings: StepSettings
    ) -> Wrapped:
        self.plain: nn.Module = structure_of(module)
        return super().wrap(module, parameters, make, settings)

    def keep(self, ema: Callable[..., Ema], parameters: Parameters) -> Ema:
        return Partitioned(self, ema(parameters=self.held(parameters)))

    def held(self, parameters: Parameters) -> Mapping[str, Tensor]:
        parts: Mapping[str, Any] = parameters
        return {name: p.ds_tensor for name, p in parts.items()}

    def full(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """On the first rank's CPU, one tensor after the other; {} on other ranks."""
        whole = {name: self.whole(tensor, self.parameters[name]) for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in whole.items() if tensor is not None}

    def whole(self, part: Tensor, p: Any) -> Tensor | None:
        """A tensor of the parameter's shape from every rank's [n] elements; None but on the first rank."""
        mine = part.detach().to(self.device).contiguous()
        pieces = [torch.empty_like(mine) for _ in range(self.world)] if self.first else None
        torch.distributed.gather(mine, pieces, dst=0)
        return torch.cat(pieces)[: p.ds_numel].view(p.ds_shape).cpu() if pieces else None

    def part(self, whole: Tensor, p: Any) -> Tensor:
        """This rank's [n] elements of a tensor of the parameter's shape, with zeros where it has none."""
        size = p.ds_tensor.numel()
        mine = whole.flatten()[self.rank * size : (self.rank + 1) * size]
        return nn.functional.pad(mine, (0, size - mine.numel()))

    def unwrap(self, module: nn.Module) -> None:
        plain = self.plain.to_empty(device="cpu") if self.first else self.plain
        self.engine.empty_partition_cache()
        parts: Iterable[tuple[str, Any]] = module.named_parameters()
        for name, p in parts:
            whole = self.whole(p.ds_tensor, p)
            if whole is not None:
                plain.get_parameter(name).data.copy_(whole)
        if self.first:
            for name, buffer in module.named_buffers():
                plain.get_buffer(name).copy_(buffer)
            become(module, plain)

    def flats(self) -> list[Tensor]:
        found: list[Tensor] = self.engine.optimizer.fp32_partitioned_groups_flat
        return found

    # not by DeepSpeed's functions for whole tensors, which fail for sizes that the processes do not divide

    def set_weight(self, p: Any, value: Tensor) -> None:
        mine = self.part(value, p)
        p.ds_tensor.data.copy_(mine)
        importlib.import_module("deepspeed.utils").safe_set_local_fp32_param(p, mine)

    def set_state(self, p: Any, key: str, value: Tensor) -> None:
        importlib.import_module("deepspeed.utils").safe_set_local_optimizer_state(p, self.part(value, p), key)
