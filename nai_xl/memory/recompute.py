"""A block computed twice: once for its value, once more for its gradient, without what the gradient does not read.

torch.utils.checkpoint does the same for any function. Knowing which layers end a block spares the hooks on every saved
tensor by which torch finds out; on a CPU they cost about as much as the recomputation itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Recomputed(torch.autograd.Function):
    """recomputed(function, ends, *args) -> function(*args), of which only the arguments are kept for the backward pass.

    ends: layers whose values reach the result by sums alone, so that no gradient depends on them. The backward pass
    must be Tensor.backward: torch.autograd.grad would find nothing to return for what `function` owns.
    Chen et al., Training Deep Nets with Sublinear Memory Cost, 1604.06174, section 3.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], ends: Sequence[nn.Module], *args: Any) -> Tensor:
        ctx.function, ctx.ends = function, ends
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.places = [place for place, arg in enumerate(args) if isinstance(arg, Tensor)]
        ctx.save_for_backward(*(args[place] for place in ctx.places))
        result = function(*args)
        ctx.device, ctx.dtype = result.device.type, _autocast_dtype(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "a recomputed block knows Tensor.backward() only, not torch.autograd.grad(); "
                "'~memory.gradient_checkpointing' goes without"
            )
        args = list(ctx.others)
        for place, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[place] = saved.detach().requires_grad_(saved.requires_grad)
        with torch.enable_grad(), _as_then(ctx.device, ctx.dtype), unread(ctx.ends):
            result = ctx.function(*args)
        torch.autograd.backward(result, gradient)
        return None, None, *(arg.grad if isinstance(arg, Tensor) else None for arg in args)


recomputed: Callable[..., Tensor] = Recomputed.apply


def _as_then(kind: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast as in the forward pass. Casts that it kept without a graph must not be used: cache_enabled=False."""
    if dtype is None and not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return nullcontext()
    return torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False)


def can_be_unread(layer: Any) -> bool:
    """Whether `unread` knows the layer: a plain linear one, or a plain convolution that keeps height and width.

    A layer with hooks or a replaced forward is refused, because those may read the layer's value.
    """
    if not isinstance(layer, nn.Module) or "forward" in vars(layer) or layer._forward_hooks:
        return False
    if type(layer) is nn.Conv2d:
        keeps_size = layer.padding == tuple((edge - 1) / 2 for edge in layer.kernel_size)
        return keeps_size and layer.stride == layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear


@contextmanager
def unread(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Layers give zeros, at no cost, where their values would be, and the right gradients all the same."""
    for layer in layers:
        # not by setattr, which looks for parameters and modules first; a call of the module finds it all the same
        layer.__dict__["forward"] = partial(_gradient_only, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def _gradient_only(layer: Any, x: Tensor) -> Tensor:
    weight, bias, dtype = layer.weight, layer.bias, _autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if isinstance(layer, nn.Linear):
        return _UnreadLinear.apply(x, weight, bias)
    return _UnreadConvolution.apply(x, weight, bias, (layer.stride, layer.padding, layer.dilation), layer.groups)


class _UnreadLinear(torch.autograd.Function):
    """x [...,I], weight [O,I], bias [O] or None -> zeros [...,O] with the gradients of x @ weight.T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dy = gradient.reshape(-1, gradient.shape[-1])
        return (
            dy.mm(weight).view(x.shape) if wanted[0] else None,
            dy.t().mm(x.reshape(-1, x.shape[-1])) if wanted[1] else None,
            dy.sum(0) if wanted[2] else None,
        )


class _UnreadConvolution(torch.autograd.Function):
    """x [B,I,H,W], weight [O,I/groups,k,k] -> zeros [B,O,H,W] with the gradients of the convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, steps: Any, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.steps, ctx.groups, ctx.bias = steps, groups, None if bias is None else list(bias.shape)
        return x.new_zeros(()).expand(len(x), len(weight), *x.shape[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.convolution_backward(
            gradient, x, weight, ctx.bias, *ctx.steps, False, [0, 0], ctx.groups, mask
        )
        return *found, None, None
