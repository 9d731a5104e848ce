"""Compile before the clock starts: one step of every bucket shape that the run will meet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nai_xl.distributed.strategy import Strategy
from nai_xl.interfaces import Losses, MicroBatch


def precompile(
    loss: Callable[[nn.Module, Any], Losses],
    module: nn.Module,
    parameter: nn.Parameter,
    strategy: Strategy,
    batches: Iterable[MicroBatch],
) -> float:
    """Forward and backward of each of `batches`, one of every shape; the seconds that it took.

    `parameter` is the first that is trained. With all of a network it belongs to the first layer, and every block lies
    between the loss and it. Blocks that are compiled are checkpointed by torch, which allows the gradient of one
    parameter alone. Weights, gradients and torch's random state are left as they were.
    """
    began = time.perf_counter()
    module.train()
    devices = [strategy.device] if strategy.device.type == "cuda" else []
    for batch in batches:
        once = partial(_mean_loss, loss, module, batch.to(strategy.device))
        with torch.random.fork_rng(devices):
            strategy.rehearse(module, once, parameter)
    if devices:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _mean_loss(loss: Callable[[nn.Module, Any], Losses], module: nn.Module, batch: MicroBatch) -> Tensor:
    return loss(module, batch).values.mean()
