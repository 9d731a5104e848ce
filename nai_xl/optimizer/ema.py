"""Exponential moving averages of the trained weights, kept in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor


class StandardEma:
    """shadow = d shadow + (1 - d) weights after every optimizer step n, with d = min(decay, (1 + n) / (10 + n)).

    The warm-up (TensorFlow's ExponentialMovingAverage) keeps short runs from staying at the initial weights.

    With `every` = N only each N-th step's weights are taken in, with the weight 1 - (product of the N steps' d): what
    the average forgets in N steps stays the same. The first 10 N steps, when it changes fast, are all taken in.
    `device` = cpu keeps the average in main memory: the weights are copied there and taken in by a thread of its own
    while training goes on; null keeps it beside the model. `parameters`: name -> weight, those whose average this
    process keeps.
    """

    without_effect: ClassVar[tuple[str, ...]] = ("device",)

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999,
        every: Annotated[int, Field(ge=1)] = 1,
        device: Literal["cpu"] | None = None,
    ):
        self.decay, self.every = decay, every
        self.live = dict(parameters)
        self.shadow = {
            name: p.detach().to(device or p.device, torch.float32, copy=True) for name, p in self.live.items()
        }
        self.pairs: tuple[list[Tensor], list[Tensor]] = [*self.shadow.values()], [*self.live.values()]
        self.away = HostCopies(self.pairs[1]) if device else None

    @property
    def on_host(self) -> bool:
        """Whether the average lies in main memory, and takes none of the device's."""
        return self.away is not None

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step number `step`, counted from 1, if its turn has come."""
        early = step <= 10 * self.every
        if step % self.every and not early:
            return
        last = range(step if early else step - self.every + 1, step + 1)
        share = 1 - math.prod(min(self.decay, (1 + n) / (10 + n)) for n in last)
        shadow, live = self.pairs
        if self.away:
            self.away.take_in(shadow, share)
        else:
            _lerp(shadow, live, share)

    def averages(self) -> dict[str, Tensor]:
        """Parameter name -> averaged weight, float32."""
        if self.away:
            self.away.wait()
        return self.shadow

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model holds the averages inside the block, and its own weights again after it."""
        own = {name: p.detach().to("cpu", copy=True) for name, p in self.live.items()}
        _copy_into(self.live, self.averages())
        try:
            yield
        finally:
            _copy_into(self.live, own)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.averages()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError when the names differ: never resume half an average."""
        if state["shadow"].keys() != self.shadow.keys():
            raise KeyError("the saved average belongs to another model")
        shadow = self.averages()  # in main memory: not before the thread has done with them
        for name, tensor in state["shadow"].items():
            shadow[name].copy_(tensor)


@torch.no_grad()
def _lerp(shadow: list[Tensor], live: list[Tensor], share: float) -> None:
    """shadow += share (live - shadow)."""
    if live[0].dtype == torch.float32:
        torch._foreach_lerp_(shadow, live, share)
    else:
        for average, weight in zip(shadow, live, strict=True):  # one by one: no float32 copy of them all at once
            average.lerp_(weight.float(), share)


class HostCopies:
    """Copies weights to main memory and takes them into an average there, beside the training."""

    def __init__(self, live: list[Tensor]):
        self.live = live
        pinned = live[0].is_cuda
        # one piece of pinned memory: for many, torch would round each size up to a power of two
        whole = torch.empty(sum(p.numel() for p in live), dtype=live[0].dtype, pin_memory=pinned)
        self.copies = [part.view(p.shape) for part, p in zip(whole.split([p.numel() for p in live]), live, strict=True)]
        self.copied = torch.cuda.Event() if pinned else None
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self.pending: Future[None] | None = None

    def take_in(self, shadow: list[Tensor], share: float) -> None:
        """shadow += share (weights - shadow), with the weights as they are now."""
        self.wait()
        # on the stream of the training itself: the next optimizer step comes after it and cannot change what is copied
        for copy, parameter in zip(self.copies, self.live, strict=True):
            copy.copy_(parameter.detach(), non_blocking=True)
        if self.copied:
            self.copied.record()
        self.pending = self.worker.submit(self._lerp_copies, shadow, share)

    def _lerp_copies(self, shadow: list[Tensor], share: float) -> None:
        if self.copied:
            self.copied.synchronize()
        _lerp(shadow, self.copies, share)

    def wait(self) -> None:
        """Return when the average has taken in everything it was given."""
        if self.pending:
            self.pending.result()
            self.pending = None


class NoEma:
    """No average: evaluation and export take the trained weights."""

    on_host = False

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.live = dict(parameters)

    def update(self, step: int) -> None:
        pass

    def averages(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.live.items()}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        yield

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@torch.no_grad()
def _copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, parameter in target.items():
        parameter.copy_(source[name])
