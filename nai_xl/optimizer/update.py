"""One optimizer update out of the gradients: clip, refuse what is not finite, step, drop the gradients.

Nothing here waits for the device: norms and verdicts stay tensors, and the meter reads them with its next report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nai_xl.optimizer.stochastic import keep_layout


class Update(Protocol):
    """Called once all gradients of an optimizer step are there."""

    def __call__(self) -> Tensor:
        """Update the weights; the gradient's norm before clipping, a scalar on the device."""
        ...


class Clipper(Protocol):
    """What an update needs of a distributed strategy (distributed/strategy.py)."""

    @property
    def scaler(self) -> Any: ...
    def norm(self, gradients: Sequence[Tensor]) -> Tensor: ...
    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor: ...


class WholeUpdate:
    """The usual update: the norm of the whole gradient, at most `max_grad_norm`, decides before any weight moves.

    `optimizer` is the one to step, as the strategy has wrapped it, and `inner` the one inside. `parameters` are
    clipped; others of the optimizer, such as a learned weighting's, are not.
    """

    def __init__(
        self,
        strategy: Clipper,
        optimizer: Any,
        inner: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        max_grad_norm: float,
    ):
        self.strategy, self.optimizer, self.inner, self.max_grad_norm = strategy, optimizer, inner, max_grad_norm
        self.parameters = list(parameters)
        clipped = {id(p) for p in self.parameters}
        self.others = [p for group in inner.param_groups for p in group["params"] if id(p) not in clipped]
        # grad_scale holds for every parameter of the optimizer, so those outside the clip must not be there
        self.folds = takes_scale(inner) and strategy.scaler is None and not self.others

    def __call__(self) -> Tensor:
        norm, goes = self._fold_clip() if self.folds else self._clip()
        if goes:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _fold_clip(self) -> tuple[Tensor, bool]:
        """Leave the division to the optimizer's kernel, which reads the gradient anyway: one pass over it less."""
        norm = self.strategy.norm([p.grad for p in self.parameters if p.grad is not None])
        self.inner.grad_scale = (norm / self.max_grad_norm).clamp(min=1.0)  # type: ignore[attr-defined]
        self.inner.found_inf = _found_inf(norm)  # type: ignore[attr-defined]
        return norm, True

    def _clip(self) -> tuple[Tensor, bool]:
        """Clip; the norm, and whether to step. The norm told is that of all, if another parameter's is not finite."""
        norm = self.strategy.clip(self.parameters, self.max_grad_norm)
        if self.strategy.scaler is not None:
            return norm, True  # fp16: the scaler skips such steps itself while it looks for a scale
        if gradients := [p.grad for p in self.others if p.grad is not None]:
            others = norm_of(gradients)
            norm = torch.where(others.isfinite(), norm, others)
        if takes_scale(self.inner):
            self.inner.found_inf = _found_inf(norm)  # type: ignore[attr-defined]
            return norm, True
        return norm, bool(norm.isfinite())  # the one wait for the device in a step, for optimizers without found_inf


class UpdateInBackward:
    """Updates each block as soon as its gradient is complete, during the backward pass, and drops that gradient.

    At no time do more gradients exist than those of the blocks in work: Lv et al., LOMO, 2306.09782, section 3.1, here
    with any optimizer, one per block. The norm of the whole gradient is known only when it is gone, so each block's own
    norm is clipped to `max_grad_norm`: equal to the usual clip as long as the whole norm is within it, and looser by at
    most the square root of the number of blocks beyond. A block whose gradient is not finite is left as it was, and so
    are those after it in the same step. A loss that is not finite reaches every block. For optimizers that cannot skip
    a step by a tensor the host waits for each block's norm.

    `make`: parameter groups -> optimizer. `free`: further groups, not clipped, such as a learned weighting's.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        parameters: Mapping[str, nn.Parameter],
        max_grad_norm: float,
        free: Sequence[dict[str, Any]] = (),
    ):
        blocks = blocks_of(parameters)
        groups = [*([{"params": list(block)}] for block in blocks), *([group] for group in free)]
        self.blocks = [[p for group in block for p in group["params"]] for block in groups]
        self.limits = [max_grad_norm] * len(blocks) + [float("inf")] * len(free)
        self.optimizers = [make(params=block) for block in groups]
        for number, optimizer in enumerate(self.optimizers):
            keep_layout(optimizer)
            # ours that round stochastically number their parameters: equal places in two blocks must not share bits
            optimizer.first_number = sum(map(len, self.blocks[:number]))
        self.waiting = [0] * len(groups)
        self._begin()
        for number, block in enumerate(self.blocks):
            for parameter in block:
                parameter.register_post_accumulate_grad_hook(self._arrival(number))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all optimizers, for the learning rate."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"blocks": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["blocks"], strict=True):
            optimizer.load_state_dict(saved)

    def __call__(self) -> Tensor:
        for number, missing in enumerate(self.waiting):
            if 0 < missing < len(self.blocks[number]):
                self._update(number)  # a block of which some weights took no part in this step
        norm = torch.stack(self.norms).norm()
        if self.bad is not None:  # where a free group's gradient alone was not finite, too
            norm = torch.where(self.bad.bool() & norm.isfinite(), float("nan"), norm)
        self._begin()
        return norm

    def _begin(self) -> None:
        self.norms: list[Tensor] = []
        self.bad: Tensor | None = None
        self.waiting = [len(block) for block in self.blocks]

    def _arrival(self, number: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            self.waiting[number] -= 1
            if self.waiting[number] == 0:
                self._update(number)

        return arrived

    @torch.no_grad()
    def _update(self, number: int) -> None:
        optimizer, limit = self.optimizers[number], self.limits[number]
        gradients = [p.grad for p in self.blocks[number] if p.grad is not None]
        norm = norm_of(gradients)
        if limit < float("inf"):
            self.norms.append(norm)
        self.bad = _found_inf(norm) if self.bad is None else torch.maximum(self.bad, _found_inf(norm))
        scale = (norm / limit).clamp(min=1.0)
        if takes_scale(optimizer):
            optimizer.grad_scale, optimizer.found_inf = scale, self.bad
            optimizer.step()
        elif not self.bad:
            torch._foreach_div_(gradients, scale)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def blocks_of(parameters: Mapping[str, nn.Parameter]) -> list[list[nn.Parameter]]:
    """A UNet's parameters by transformer block and ResNet block; the others by the part of the UNet they are in."""
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        inner = re.match(r".*(transformer_blocks|resnets)\.\d+(?=\.)", name)
        blocks.setdefault(inner[0] if inner else name.split(".")[0], []).append(parameter)
    return list(blocks.values())


def takes_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its kernel divides by `grad_scale` and skips by `found_inf`, as torch's fused optimizers do.

    The attribute is torch's own protocol: torch.amp.GradScaler asks for it in just this way.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return all(group.get("fused", True) for group in optimizer.param_groups)


def poisoned(loss: Tensor) -> Tensor:
    """The loss, with a gradient of NaN where the loss is not finite: some errors have finite gradients at infinity."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of them all as one vector, float32 whatever they are."""
    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float32)).norm()


def _found_inf(norm: Tensor) -> Tensor:
    return (~norm.isfinite()).float()
