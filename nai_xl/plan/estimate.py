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
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nai_xl.engine.gpus import GIB
from nai_xl.interfaces import MemoryAction
from nai_xl.memory import layout
from nai_xl.memory.compiled import ActivationBudget, Compile
from nai_xl.model.flops import inputs
from nai_xl.optimizer.adamw_8bit import AdamW8bit
from nai_xl.optimizer.adamw_bf16 import AdamWBf16
from nai_xl.optimizer.update import OptimizerInBackward, UpdateInBackward

BLOCK = 512  # bytes; the CUDA caching allocator gives no less
ALLOWANCE = int(0.75 * GIB)
"""CUDA's context with its loaded kernels (0.4 to 0.6 GiB), and workspaces of cuBLAS and cuDNN."""
AVERAGED = 5040  # a step that every average takes in, whatever its `every` up to 10
SLACK = 0.03
"""What the caching allocator holds and cannot use, as a share of the peak; with expandable segments, as is advised."""

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
COUNTED = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_FLASH],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_FLASH_BACKWARD],
}
"""Operation -> its FLOPs; torch's own registry has attention on a GPU only."""


@dataclass(frozen=True)
class Micro:
    """One micro-batch on one device, and how it is computed.

    precision: no | bf16 | fp16, accelerate's autocast. keeps_gradients: they outlive a step, as with grad_accum > 1 and
    in DistributedDataParallel's buckets.
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
    after_backward: int  # alive when the backward pass is done
    flops: int  # of the micro-batch, with what is recomputed
    estimated: bool = False  # activations are not counted but taken from a documented ratio

    @property
    def phase(self) -> str:
        """The one with the highest peak; the earliest of equals."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def peak(self) -> int:
        return self.peaks[self.phase]

    def keeping(self, share: float) -> Footprint:
        """With this share of the activations; nothing falls below what the backward pass ends with."""
        spared = int(self.activations * (1 - share))
        peaks = {
            name: max(peak - spared, self.after_backward) if name in ("forward", "backward") else peak
            for name, peak in self.peaks.items()
        }
        return replace(self, activations=self.activations - spared, peaks=peaks, estimated=True)

    @property
    def needed(self) -> int:
        """The peak with what lies outside of tensors: compare it with the card's memory."""
        return int(self.peak * (1 + SLACK)) + ALLOWANCE


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once, and the most there were; FLOPs.

    Storages are told apart by identity and forgotten when they are freed. `casts`: those of them that are copies of
    weights in another type.
    """

    def __init__(self, *, block: int = BLOCK):
        super().__init__()
        self.block, self.live, self.peak, self.casts = block, 0, 0, 0
        self.flops = 0
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
        if count := COUNTED.get(getattr(func, "_overloadpacket", None)):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (size := self.add(leaf)) and func is torch.ops.aten._to_copy.default:
                self._note_cast(args[0], leaf, size)
        return out

    def _note_cast(self, source: Tensor, copy: Tensor, size: int) -> None:
        if source.untyped_storage()._cdata in self._weights:
            self._cast.add(copy.untyped_storage()._cdata)
            self.casts += size


class RehearsedBytes(LiveBytes):
    """LiveBytes on tensors without values, for which a 0-dim operand of these in-place operations cannot be read."""

    ALLOCATE_NOTHING = frozenset(getattr(torch.ops.aten, f"_foreach_{name}_").Tensor for name in ("add", "mul", "div"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func in self.ALLOCATE_NOTHING else super().__torch_dispatch__(func, types, args, kwargs)


def as_cuda_autocasts(unet: nn.Module) -> None:
    """Norms take float32 under autocast on CUDA, where the CPU's autocast leaves them their inputs' type.

    https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32".
    """
    for module in unet.modules():
        if type(module) in (nn.GroupNorm, nn.LayerNorm):
            module.register_forward_pre_hook(_widened)


def _widened(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return (given[0].float(), *given[1:]) if torch.is_autocast_enabled("cpu") else None


class OneKernel(torch.autograd.Function):
    """The bytes of memory=[channels_last]'s Triton kernel: keeps x and two numbers by group, gives what x is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias, x.new_empty((2, len(x), groups), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), None


def norm_in_one_kernel(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool
) -> Any:  # of layout.group_norm's signature
    return OneKernel.apply(x, weight, bias, groups)


def update_in_one_kernel(*_: Any) -> None:
    """AdamWBf16's and AdamW8bit's: weights and state change in place."""


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@dataclass
class Rehearsal:
    """One training step without storage.

    unet: on the meta device, before any action. optimizer, average: built from its parameters and from it, as in a run;
    average is None for one that lies in main memory. cuda: count as on an NVIDIA GPU, otherwise as on a CPU.
    """

    unet: Any
    actions: Sequence[MemoryAction]
    optimizer: Callable[..., Any]
    average: Callable[..., Any] | None
    max_grad_norm: float = 1.0
    cuda: bool = True

    def run(self, micro: Micro) -> Footprint:
        """Rehearse a step that has others before it."""
        live = RehearsedBytes(block=BLOCK if self.cuda else 1)
        self._prepare_model()
        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            if self.cuda:
                # Triton's kernels run on a GPU only: in their place something of the same memory
                stack.enter_context(replaced(layout, "group_norm", norm_in_one_kernel))
                for optimizer in (AdamWBf16, AdamW8bit):
                    stack.enter_context(replaced(optimizer, "update", update_in_one_kernel))
            stack.enter_context(live)
            found = self._run(micro, live)
        share = kept_share(self.actions)
        return found if share is None else found.keeping(share)

    def _prepare_model(self) -> None:
        """Still on the meta device, where parameters may change their type."""
        for action in self.actions:
            if not isinstance(action, Compile | ActivationBudget):  # of which `kept_share` tells
                action.apply(self.unet)
        if self.cuda:
            as_cuda_autocasts(self.unet)
        self.unet.train()
        warm_up(self.optimizer)

    def _run(self, micro: Micro, live: LiveBytes) -> Footprint:
        unet = self.unet
        with live.elsewhere():
            unet._apply(lambda t: torch.empty_like(t, device="cpu"))
        parameters = list(unet.parameters())
        weights = live.add_weights(parameters)
        average = self.average(parameters=dict(unet.named_parameters())) if self.average else None
        ema = live.live - weights
        given = inputs(unet, micro.batch, micro.height, micro.width, tokens=micro.tokens, device="cpu")
        with_inputs = live.live
        step = _Step(live, unet, self._update(unet), average, given, micro)
        step.prepare()
        state = live.live - with_inputs - (step.gradients if micro.keeps_gradients else 0)
        saved, casts = step.run()
        return Footprint(
            parameters=sum(p.numel() for p in parameters),
            weights=weights,
            gradients=step.gradients,
            optimizer=state,
            ema=ema,
            cast_copy=casts,
            activations=saved - casts,
            peaks=step.peaks,
            after_backward=step.after_backward,
            flops=live.flops,
        )

    def _update(self, unet: nn.Module) -> UpdateInBackward | Whole:
        if any(isinstance(action, OptimizerInBackward) for action in self.actions):
            return UpdateInBackward(self.optimizer, dict(unet.named_parameters()), self.max_grad_norm)
        return Whole(self.optimizer(params=[{"params": list(unet.parameters())}]), self.max_grad_norm)


def warm_up(optimizer: Callable[..., Any]) -> None:
    """One step with values, for tables that an optimizer makes once and keeps."""
    parameter = nn.Parameter(torch.zeros(128, 128))
    parameter.grad = torch.zeros(128, 128)
    optimizer(params=[parameter]).step()


@dataclass
class Whole:
    """The loop's WholeUpdate, which needs no accelerator here."""

    optimizer: torch.optim.Optimizer
    max_grad_norm: float

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def __call__(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()


@dataclass
class _Step:
    live: LiveBytes
    unet: Any
    update: Any  # called once the gradients are there; `optimizers`
    average: Any
    given: dict[str, Any]
    micro: Micro
    peaks: dict[str, int] = field(default_factory=dict)
    gradients: int = 0
    after_backward: int = 0

    def prepare(self) -> None:
        """The optimizer's state, and gradients where they stay."""
        for parameter in self.unet.parameters():
            parameter.grad = torch.empty_like(parameter)
        for optimizer in self.update.optimizers:
            optimizer.step()
        if isinstance(self.update, UpdateInBackward):
            self.unet.zero_grad(set_to_none=True)
        self.gradients = self._gradient_bytes()
        self._forget_gradients()

    def run(self) -> tuple[int, int]:
        """Bytes that the backward pass waited for, and those of them that are casts of weights."""
        live, before, casts = self.live, self.live.live, self.live.casts
        live.flops = 0
        with self._phase("forward"):
            loss = self._loss()
        saved, casts = live.live - before, live.casts - casts
        with self._phase("backward"):
            loss.backward()
        self.after_backward = live.live
        with self._phase("optimizer"):
            self.update()
            self._forget_gradients()
        if self.average is not None:
            with self._phase("average"):
                self.average.update(AVERAGED)
        return saved, casts

    def _loss(self) -> Tensor:
        dtype = self.micro.autocast
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            prediction = self.unet(**self.given, return_dict=False)[0]
        return F.mse_loss(prediction.float(), self.given["sample"])

    def _gradient_bytes(self) -> int:
        block = self.live.block
        return sum(-(-p.grad.nbytes // block) * block for p in self.unet.parameters() if p.grad is not None)

    def _forget_gradients(self) -> None:
        if not self.micro.keeps_gradients:
            self.unet.zero_grad(set_to_none=True)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.live.peak = self.live.live
        yield
        self.peaks[name] = self.live.peak


# --- what torch.compile decides ---------------------------------------------------------------------------------------

KEPT = ((0.0, 0.09), (0.5, 0.58), (1.0, 1.0))
"""(activation budget, share of the eager activations that compiled blocks keep).

At 0.5 torch's partitioner halves what a transformer block of SDXL keeps (70.8 to 35.4 MiB) and leaves a sixth of a
ResNet block's: 3.5 to 3.9 of the UNet's 6.42 GiB; at 0 only the blocks' inputs stay, as with full checkpointing, 0.55.
"""


def kept_share(actions: Sequence[MemoryAction]) -> float | None:
    """The share of the counted activations that is kept under a budget; None where the count itself holds.

    Compiled blocks without a budget keep somewhat less than counted; there is no figure for how much.
    """
    budgets = [action.budget for action in actions if isinstance(action, ActivationBudget)]
    if not budgets or not any(isinstance(action, Compile) for action in actions):
        return None
    (low, at_low), (high, at_high) = KEPT[:2] if budgets[0] <= KEPT[1][0] else KEPT[1:]
    return at_low + (at_high - at_low) * (budgets[0] - low) / (high - low)
