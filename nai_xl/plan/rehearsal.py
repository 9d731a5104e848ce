"""How much memory a training step takes: the step is rehearsed on tensors without storage, and their bytes are counted.

torch's FakeTensorMode runs the real UNet with the real memory actions, autocast, autograd, optimizer and average, on
tensors that know their shape and own nothing. Every tensor that is alive is counted, each storage once, rounded up as
the CUDA caching allocator does. So nothing is modelled that could be forgotten: temporaries of the backward pass,
recomputed blocks and autocast's copies of the weights come out as they come. What lies outside of tensors is left to
footprint's `ALLOWANCE` and `SLACK`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from nai_xl.memory.action import MemoryAction
from nai_xl.model.flops import inputs
from nai_xl.optimizer import dry_run
from nai_xl.optimizer.update import UpdateInBackward
from nai_xl.plan.footprint import Footprint, kept_share
from nai_xl.plan.live_bytes import BLOCK, LiveBytes, RehearsedBytes

AVERAGED = 5040  # a step that every average takes in, whatever its `every` up to 10


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
        with FakeTensorMode(allow_non_fake_inputs=True), dry_run.of_a_gpu() if self.cuda else nullcontext(), live:
            found = self._run(micro, live)
        share = kept_share(self.actions)
        return found if share is None else found.keeping(share)

    def _prepare_model(self) -> None:
        """Still on the meta device, where parameters may change their type."""
        for action in self.actions:
            if not action.compiles and action.activation_budget is None:  # of which `kept_share` tells
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
        if micro.autocast == torch.bfloat16 or any(action.weights_in == torch.bfloat16 for action in self.actions):
            self._narrow(given)
        with_inputs = live.live
        step = _Step(live, unet, self._update(unet), self._in_backward, average, given, micro)
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

    @staticmethod
    def _narrow(given: dict[str, Any]) -> None:
        """As the task tells a network that computes in bfloat16 of its texts."""
        given["encoder_hidden_states"] = given["encoder_hidden_states"].bfloat16()
        added = given["added_cond_kwargs"]
        given["added_cond_kwargs"] = {**added, "text_embeds": added["text_embeds"].bfloat16()}

    @property
    def _in_backward(self) -> bool:
        return any(action.updates_in_backward for action in self.actions)

    def _update(self, unet: nn.Module) -> UpdateInBackward | Whole:
        if self._in_backward:
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
    update: UpdateInBackward | Whole
    in_backward: bool
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
        if self.in_backward:
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
