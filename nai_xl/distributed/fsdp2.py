"""distributed=fsdp2: every process keeps a part of each weight, gradient, moment and average.

torch's own fully_shard is used: accelerate's FSDP2 plugin trains plain copies on a CPU and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from nai_xl.distributed.alone import process_group
from nai_xl.distributed.plain import become, row_major, structure_of
from nai_xl.distributed.rows import ShardedEma, ShardedOptimizer, ShardedWeights, blocks_of
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
from nai_xl.errors import UserError
from nai_xl.interfaces import Ema, Precision, Stateful
from nai_xl.memory.action import MemoryAction
from nai_xl.optimizer import blockwise
from nai_xl.optimizer.part import Part, in_parts, needs_whole_tensors
from nai_xl.optimizer.update import WholeUpdate, norm_of


@dataclass(frozen=True)
class Fsdp2(Engine):
    """torch's fully_shard: the weights of a block are collected when it computes, and dropped after it.

    Every transformer and ResNet block is collected by itself, all else together. Computation is what it is with other
    engines: float32 weights, cast by autocast where precision says so, so that losses agree. bfloat16 weights are
    collected as such, and their gradients added up in float32. Under autocast the backward pass keeps the casts of a
    block's weights unless memory=[gradient_checkpointing] computes the block again.

    shard_size: processes that share one copy of the model, such as those of one machine; null: all. With fewer than all
    there are several copies, whose gradients are averaged (HSDP). run.grad_accum adds gradients up before they are
    exchanged, which keeps one whole gradient on every process.

    timeout: minutes that a process may be silent, or all of them without progress, until the run ends.
    """

    several: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    shard_size: Annotated[int, Field(ge=1)] | None = None
    timeout: Minutes = TIMEOUT

    def refuse_beside(
        self, actions: Sequence[MemoryAction], optimizer: Callable[..., Any], precision: Precision
    ) -> None:
        if precision == "fp16":
            raise UserError("distributed=fsdp2 has no loss scaler; set precision=bf16, or distributed=ddp")
        if any(action.updates_in_backward for action in actions):
            raise UserError(
                "memory: optimizer_in_backward needs whole gradients, and distributed=fsdp2 shares them out; set "
                "'~memory.optimizer_in_backward', or distributed=ddp on one process"
            )
        if untried := [action.key for action in actions if action.replaces_products]:
            raise UserError(
                f"memory: {untried[0]} has not been tried with distributed=fsdp2; set '~memory.{untried[0]}', or "
                "distributed=ddp"
            )
        if needs_whole_tensors(optimizer):
            name = getattr(optimizer, "func", optimizer).__name__
            raise UserError(
                f"optimizer: {name} computes with whole tensors, and distributed=fsdp2 gives a process some rows; "
                "set optimizer=adamw8bit, or distributed=ddp"
            )

    def start(self, precision: Precision) -> Strategy:
        group = joined(precision, self.timeout)
        kind, world = group.device.type, group.num_processes
        if world % (self.shard_size or world):
            raise UserError(
                f"distributed.shard_size={self.shard_size} does not divide the {world} processes; set it to a divisor, "
                "or distributed.shard_size=null"
            )
        process_group(kind)
        if self.shard_size in (None, world):
            return FullySharded(group, init_device_mesh(kind, (world,), mesh_dim_names=("shard",)))
        sizes = (world // self.shard_size, self.shard_size)
        return FullySharded(group, init_device_mesh(kind, sizes, mesh_dim_names=("replicate", "shard")))


@dataclass
class FullySharded(Ranks):
    """Rows of every parameter as plain tensors: what optimizers, averages and checkpoints see.

    They share the storage of the DTensors that fully_shard makes of a network's parameters, and are given the DTensors'
    gradients after the last backward pass of a step.
    """

    lockstep: ClassVar[bool] = True

    mesh: DeviceMesh
    scaler: None = None
    parts: dict[Tensor, Part] = field(default_factory=dict, init=False)  # of local tensors
    named: dict[str, Part] = field(default_factory=dict, init=False)  # by the names of what is trained
    inner: Any = field(default=None, init=False)  # the optimizer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.group = self.mesh.get_group("shard")
        self.number, self.count = self.mesh.get_local_rank("shard"), self.mesh.size(self.mesh.ndim - 1)
        self.saves = self.mesh.ndim == 1 or self.mesh.get_local_rank("replicate") == 0

    # --- wrapping -----------------------------------------------------------------------------------------------------

    def wrap(
        self, module: nn.Module, parameters: Parameters, make: MakeOptimizer | None, settings: StepSettings
    ) -> Wrapped:
        assert make is not None, "refuse_beside has refused what updates without an optimizer of its own"
        names = {id(p): name for name, p in module.named_parameters()}
        places = {name: names[id(p)] for name, p in parameters.items()}
        self.plain = structure_of(module)
        self._shard(module)
        self.shared = {name: module.get_parameter(place) for name, place in places.items()}
        local = {name: self._local(p) for name, p in self.shared.items()}
        self.parts = {local[name]: self._part(p) for name, p in self.shared.items()}
        self.named = {name: self.parts[p] for name, p in local.items()}
        self.inner = inner = make(local)
        in_parts(inner, self.parts)
        update = WholeUpdate(self, inner, inner, local.values(), settings.max_grad_norm)
        return Wrapped(module, local, inner, update, self._remarks(inner))

    def _remarks(self, inner: Any) -> list[str]:
        if not blocks_of(inner):
            return []
        whole = [part for part in self.parts.values() if blockwise.fits(torch.empty(part.shape, device="meta"))]
        cut = [part for part in whole if not part.cut_between(blockwise.BLOCK)]
        if not cut:
            return []
        return [
            f"optimizer: {len(cut)} of {len(whole)} tensors keep moments in the weights' own type, not in 8 bits: "
            f"{self.count} processes cut through their blocks of {blockwise.BLOCK}. distributed.shard_size=N cuts "
            "otherwise."
        ]

    def _shard(self, module: nn.Module) -> None:
        from nai_xl.memory.compile import BLOCKS  # with diffusers, which takes seconds to import

        before = _bytes(module.parameters())
        row_major(module)
        self.accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)  # autocast alone
        half = any(p.dtype == torch.bfloat16 for p in module.parameters())
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False)
        for block in [m for m in module.modules() if isinstance(m, BLOCKS) and m is not module]:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        # the root too is dropped after its forward pass: an evaluation must not leave its weights behind
        fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        for method in getattr(module, "forward_methods", ()):  # of ours that are called otherwise, too
            register_fsdp_forward_method(module, method)
        self._refuse_unsharded(module, before)

    def _refuse_unsharded(self, module: nn.Module, before: int) -> None:
        """Raises UserError unless every process now holds its part of the bytes only, up to the last rows' padding."""
        plain = [name for name, p in module.named_parameters() if not isinstance(p, DTensor)]
        rows = {name: self._part(p) for name, p in module.named_parameters()}
        share = sum(rows[name].each * rows[name].width * p.element_size() for name, p in module.named_parameters())
        held = _bytes(p.to_local() for p in module.parameters() if isinstance(p, DTensor))
        if plain or held > share or (self.count > 1 and held >= before > 0):
            raise UserError(
                f"distributed=fsdp2: torch did not share out the model ({len(plain)} plain parameters; a process holds "
                f"{held} of {before} bytes); set distributed=ddp"
            )

    def _part(self, p: Tensor) -> Part:
        return Part(tuple(p.shape), self.number, self.count)

    def _local(self, p: Any) -> nn.Parameter:
        return nn.Parameter(p.to_local().detach(), p.requires_grad)

    # --- a step -------------------------------------------------------------------------------------------------------

    @contextmanager
    def accumulating(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        module.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
        if last:
            for local, shared in zip(self.parts, self.shared.values(), strict=True):
                local.grad = None if shared.grad is None else shared.grad.to_local()  # type: ignore[attr-defined]
                shared.grad = None

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def rehearse(self, module: nn.Module, loss: Callable[[], Tensor], parameter: nn.Parameter) -> None:
        with self.accumulating(module, last=True):
            loss().backward()
        self.inner.zero_grad()  # of what is learned beside the network, too

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """All shards of one copy together; other copies have the same."""
        square = norm_of(gradients).double().square() if gradients else torch.zeros((), dtype=torch.float64)
        square = square.to(self.device)
        distributed.all_reduce(square, group=self.group)
        return square.sqrt().float()

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = self.norm(gradients)
        if gradients:
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    # --- beside the steps ---------------------------------------------------------------------------------------------

    def keep(self, ema: Callable[..., Ema], parameters: Parameters) -> Ema:
        return ema(parameters=parameters)

    def full(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """On the first rank's CPU, one tensor after the other; {} on other ranks."""
        whole = {name: self._whole(tensor, self.named[name]) for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in whole.items() if tensor is not None}

    @torch.no_grad()
    def _whole(self, rows: Tensor, part: Part) -> Tensor | None:
        if not self.saves:
            return None
        padded = torch.zeros((part.each, *part.shape[1:]), dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in range(self.count)] if self.first else None
        distributed.gather(padded, pieces, dst=0, group=self.group)
        return torch.cat(pieces)[: part.shape[0]].cpu() if pieces else None

    def unwrap(self, module: nn.Module) -> None:
        plain = self.plain.to_empty(device="cpu") if self.first else self.plain
        for name, p in module.named_parameters():
            whole = self._whole(p.to_local(), self._part(p))  # type: ignore[attr-defined]
            if whole is not None:
                plain.get_parameter(name).data.copy_(whole)
        if self.first:
            for name, buffer in module.named_buffers():
                plain.get_buffer(name).copy_(buffer)
            become(module, plain)

    def stateful(self, parameters: Parameters, optimizer: Any, ema: Ema) -> dict[str, Stateful]:
        return {
            "weights": ShardedWeights(parameters, self.parts, self.saves),
            "ema": ShardedEma(ema, parameters, self.parts, self.saves),
            "optimizer": ShardedOptimizer(optimizer, self.parts, self.saves),
        }


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
