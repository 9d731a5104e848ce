"""Launches of the Triton kernels over many tensors at once."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from nai_xl.optimizer import blockwise
from nai_xl.optimizer.stochastic import flat, in_layout_of

CHUNK = 16384  # elements of one program: SDXL's UNet makes 158,000 programs


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def available(p: Tensor) -> bool:
    """Whether kernels run on this parameter's device; Triton comes with torch's CUDA and ROCm builds."""
    return p.is_cuda and _triton_is_installed()


def adamw(optimizer: Any, group: dict[str, Any], params: list[Tensor], corrections: Tensor, keys: Tensor) -> None:
    """AdamWBf16's step for parameters of one type in one kernel. corrections, keys [n,2]."""
    from nai_xl.optimizer import kernels

    _launch(optimizer, group, params, corrections, keys, kernels.adamw, ("exp_avg", "exp_avg_sq"))


def adamw8bit(optimizer: Any, group: dict[str, Any], params: list[Tensor], corrections: Tensor, keys: Tensor) -> None:
    """The same with moments in 8 bits."""
    from nai_xl.optimizer import kernels

    names = ("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales")
    device = params[0].device
    tables = [of(signed, device) for signed in (True, False) for of in (blockwise.code_values, blockwise.code_bounds)]
    _launch(optimizer, group, params, corrections, keys, kernels.adamw8bit, names, *tables)


def subtract(optimizer: Any, p: Tensor, change: Tensor, decay: float, key: Tensor) -> None:
    """p <- decay p - change, rounded; `change` float32 [numel] in the order of storage, key [2]."""
    from nai_xl.optimizer import kernels

    found = getattr(optimizer, "found_inf", None)
    kernels.subtract[(-(-p.numel() // 1024),)](
        flat(p), change, key, key if found is None else found, decay, p.numel(),
        BLOCK=1024, ROUND=p.dtype == torch.bfloat16, GUARDED=found is not None, enable_fp_fusion=False,
    )  # fmt: skip


def _launch(
    optimizer: Any, group: dict[str, Any], params: list[Tensor], corrections: Tensor, keys: Tensor, kernel: Any,
    names: tuple[str, ...], *codes: Tensor,
) -> None:  # fmt: skip
    gradients = [in_layout_of(p, p.grad) for p in params if p.grad is not None]  # held until the kernel is queued
    columns = [params, gradients, *([optimizer.state[p][name] for p in params] for name in names)]
    addresses = [[x.data_ptr() for x in column] for column in columns]
    sizes = tuple(p.numel() for p in params)
    firsts = [optimizer.first_element(p) for p in params]
    table = _sent([list(row) for row in zip(*addresses, sizes, firsts, strict=True)], params[0].device)
    chunks = _chunks(sizes, params[0].device)
    if not len(chunks):  # parts without an element
        return
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    kernel[(len(chunks),)](
        table, chunks, corrections, keys, table if scale is None else scale, table if found is None else found, *codes,
        lr, 1 - lr * group["weight_decay"], beta1, 1 - beta1, beta2, 1 - beta2, group["eps"],
        WEIGHT=_triton_type(params[0]), GRADIENT=_triton_type(gradients[0]),
        CHUNK=CHUNK, SCALED=scale is not None, GUARDED=found is not None,
        ALIGNED=all(number % 16 == 0 for column in (*addresses, sizes) for number in column),
        enable_fp_fusion=False,  # rounded as the plain torch is, operation by operation
    )  # fmt: skip


def _sent(rows: list[list[int]], device: torch.device) -> Tensor:
    """int64 numbers on the device, without waiting for it: torch keeps a pinned buffer until its copy is done."""
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@functools.lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[programs,2] int32: which tensor, and which chunk of it."""
    rows = [[i, chunk] for i, size in enumerate(sizes) for chunk in range(-(-size // CHUNK))]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _triton_type(x: Tensor) -> Any:
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[x.dtype]
