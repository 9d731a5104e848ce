"""Compile before the clock starts: one step of every bucket shape that the run will meet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

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
    between the loss and it: its gradient alone runs all of their backward passes, keeps no other gradient, and calls
    none of the hooks that wait for one to be accumulated. Blocks that are compiled are checkpointed by torch, which
    allows that. Weights, gradients and torch's random state are left as they were.
    """
    began = time.perf_counter()
    module.train()
    devices = [strategy.device] if strategy.device.type == "cuda" else []
    for batch in batches:
        with torch.random.fork_rng(devices), strategy.accumulating(module, last=False):
            losses = loss(module, batch.to(strategy.device))
            torch.autograd.grad(losses.values.mean(), parameter)
    if devices:
        torch.cuda.synchronize()
    return time.perf_counter() - began
