"""How much memory a training step takes: the step is rehearsed on tensors without storage, and their bytes are counted.

torch's FakeTensorMode runs the real UNet with the real memory actions, autocast, autograd, optimizer and average, on
tensors that know their shape and own nothing. Every tensor that is alive is counted, each storage once, rounded up as
the CUDA caching allocator does. So nothing is modelled that could be forgotten: temporaries of the backward pass,
recomputed blocks and autocast's copies of the weights come out as they come. What lies outside of tensors is left to
`ALLOWANCE` and `SLACK`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nai_xl.engine.hardware import GIB
from nai_xl.model.flops import inputs
from nai_xl.types import MemoryAction

BLOCK = 512  # bytes; the CUDA caching allocator gives no less
ALLOWANCE = int(0.75 * GIB)
"""CUDA's context with its loaded kernels (0.4 to 0.6 GiB), and workspaces of cuBLAS and cuDNN."""
SLACK = 0.03
"""What the caching allocator holds and cannot use, as a share of the peak; with expandable segments, as is advised."""


@dataclass(frozen=True)
class Micro:
    """One micro-batch on one device, and how it is computed.

    precision: no | bf16 | fp16, accelerate's autocast. keeps_gradients: they outlive a step, as with grad_accum > 1 and
    in DistributedDataParallel's buckets. clips: the norm of all gradients is limited.
    """

    batch: int
    height: int
    width: int
    tokens: int = 77
    precision: str = "no"
    keeps_gradients: bool = False

    @property
    def autocast(self) -> torch.dtype | None:
        return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device, of one step that has others before it. `peaks`: phase -> the most that is alive in it."""

    parameters: int  # number, not bytes
    weights: int
    gradients: int
    optimizer: int
    ema: int
    cast_copy: int  # autocast's copies of the weights that the backward pass waits for
    activations: int  # all else that the backward pass waits for
    peaks: Mapping[str, int]
    ema_on_host: int = 0
    offloaded: int = 0  # activations that wait in the computer's memory
    executed_flops: int = 0  # of the whole step with what is recomputed
    operations: int = 0  # that the host hands to the device in a step

    @property
    def phase(self) -> str:
        """The one with the highest peak; the earliest of equals."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def peak(self) -> int:
        return self.peaks[self.phase]

    @property
    def needed(self) -> int:
        """The peak with what lies outside of tensors: compare it with the card's memory."""
        return int(self.peak * (1 + SLACK)) + ALLOWANCE


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once, and the most there were; FLOPs and operations.

    Storages are told apart by identity and forgotten when they are freed. `casts`: those of them that are copies of
    weights in another type.
    """

    def __init__(self, *, block: int = BLOCK):
        super().__init__()
        self.block, self.live, self.peak, self.casts = block, 0, 0, 0
        self.operations, self.flops = 0, 0
        self._alive: dict[int, int] = {}
        self._weights: set[int] = set()
        self._cast: set[int] = set()
        self.hidden = False

    def add(self, tensor: Tensor) -> int:
        """Count a tensor's storage unless it is counted already; its bytes if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or self.hidden:
            return 0
        size = -(-storage.nbytes() // self.block) * self.block
        self._alive[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)
        return size

    def add_weights(self, tensors: Sequence[Tensor]) -> int:
        self._weights.update(t.untyped_storage()._cdata for t in tensors)
        return sum(map(self.add, tensors))

    def _free(self, key: int) -> None:
        size = self._alive.pop(key)
        self.live -= size
        if key in self._cast:
            self._cast.remove(key)
            self.casts -= size

    @contextmanager
    def elsewhere(self, really: bool = True) -> Iterator[None]:
        """Tensors made inside the block lie on another device."""
        self.hidden, before = really or self.hidden, self.hidden
        try:
            yield
        finally:
            self.hidden = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        if count := flop_registry.get(getattr(func, "_overloadpacket", None)):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (size := self.add(leaf)) and func is torch.ops.aten._to_copy.default:
                self._note_cast(args[0], leaf, size)
        return out

    def _note_cast(self, source: Tensor, copy: Tensor, size: int) -> None:
        if source.untyped_storage()._cdata in self._weights:
            self._cast.add(copy.untyped_storage()._cdata)
            self.casts += size


def as_cuda_autocasts(unet: nn.Module) -> None:
    """Norms take float32 under autocast on CUDA, where the CPU's autocast leaves them their inputs' type.

    https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32".
    """
    for module in unet.modules():
        if type(module) in (nn.GroupNorm, nn.LayerNorm):
            module.register_forward_pre_hook(_widened)


def _widened(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return (given[0].float(), *given[1:]) if torch.is_autocast_enabled("cpu") else None


@dataclass
class Rehearsal:
    """One training step without storage.

    unet: on the meta device, before any action. Building the optimizer takes its parameter groups, building the average
    takes the model, as in a run. cuda: count as on an NVIDIA GPU, otherwise as on a CPU.
    """

    unet: UNet2DConditionModel
    actions: Sequence[MemoryAction]
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    average: Callable[[nn.Module], Any]
    average_on_host: bool = False
    cuda: bool = True
    live: LiveBytes = field(init=False)

    def __post_init__(self) -> None:
        self.live = LiveBytes(block=BLOCK if self.cuda else 1)

    def run(self, micro: Micro) -> Footprint:
        """Rehearse two steps and report the second, when the optimizer has its state."""
        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(self.live)
            return self._run(micro)

    def _run(self, micro: Micro) -> Footprint:
        live, unet = self.live, self.unet
        with live.elsewhere():
            unet._apply(lambda t: torch.empty_like(t, device="cpu"))
            unet.train()
            for action in self.actions:
                action.apply(unet)
            if self.cuda:
                as_cuda_autocasts(unet)
        parameters = list(unet.parameters())
        weights = live.add_weights(parameters)
        optimizer = self.optimizer([{"params": parameters}])
        before = live.live
        with live.elsewhere(self.average_on_host):
            average = self.average(unet)
        ema = live.live - before
        given = inputs(unet, micro.batch, micro.height, micro.width, tokens=micro.tokens, device="cpu")
        step = _Step(live, unet, optimizer, average, given, micro, self.average_on_host)
        step.prepare()
        saved, gradients = step.run()
        return Footprint(
            parameters=sum(p.numel() for p in parameters),
            weights=weights,
            gradients=gradients,
            optimizer=live.live - weights - ema - step.given_bytes - (gradients if micro.keeps_gradients else 0),
            ema=ema,
            cast_copy=saved.casts,
            activations=saved.total - saved.casts,
            peaks=step.peaks,
            ema_on_host=sum(t.nbytes for t in average.averages().values()) if self.average_on_host else 0,
            executed_flops=live.flops,
            operations=live.operations,
        )


@dataclass(frozen=True)
class _Saved:
    total: int
    casts: int


@dataclass
class _Step:
    live: LiveBytes
    unet: UNet2DConditionModel
    optimizer: torch.optim.Optimizer
    average: Any
    given: dict[str, Any]
    micro: Micro
    average_on_host: bool
    peaks: dict[str, int] = field(default_factory=dict)
    given_bytes: int = 0

    def prepare(self) -> None:
        """The optimizer's state, and gradients where they stay."""
        self.given_bytes = sum(self.live.add(t) for t in tree_leaves(self.given) if isinstance(t, Tensor))
        for parameter in self.unet.parameters():
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self._forget_gradients()

    def run(self) -> tuple[_Saved, int]:
        """What the backward pass waited for, and the bytes of the gradients."""
        live, before = self.live, self.live.live
        live.operations = live.flops = 0
        with self._phase("forward"):
            loss = self._loss()
        saved = _Saved(live.live - before, live.casts)
        with self._phase("backward"):
            loss.backward()
        gradients = sum(-(-p.grad.nbytes // live.block) * live.block for p in self.unet.parameters() if p.grad is not None)
        with self._phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self._forget_gradients()
        with self._phase("average"), live.elsewhere(self.average_on_host):
            self.average.update(1)
        return saved, gradients

    def _loss(self) -> Tensor:
        with self._autocast():
            prediction = self.unet(**self.given, return_dict=False)[0]
        return F.mse_loss(prediction.float(), self.given["sample"])

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.micro.autocast
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def _forget_gradients(self) -> None:
        if not self.micro.keeps_gradients:
            self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.live.peak = self.live.live
        yield
        self.peaks[name] = self.live.peak
