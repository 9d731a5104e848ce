"""Compile before the clock starts: one step of every bucket shape that the run will meet."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nai_xl.diffusion.objective import Objective
from nai_xl.interfaces import Batch, Bucket


def warm_up(
    objective: Objective,
    unet: nn.Module,
    accelerator: Accelerator,
    sample: Batch,
    buckets: Iterable[Bucket],
    batch_size: int,
) -> float:
    """Forward and backward of `batch_size` random samples in each bucket; the seconds that it took.

    `sample` is any of the data set, for the shapes and types of everything but the latents. Weights, gradients and
    torch's random state are left as they were. Buckets are visited in their order by size, whatever the run meets
    first: graphs depend on the order of shapes, so a run that is continued gets those that it had.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    unet.train()
    # every block lies between the loss and the first layer, so that its gradient alone runs all of their backward
    # passes, keeps no other gradient, and calls none of the hooks that wait for one to be accumulated. Blocks that are
    # compiled are checkpointed by torch, which allows that
    first = next(unet.parameters())
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    for bucket in sorted(set(buckets)):
        batch = random_batch(sample, bucket, batch_size, generator).to(accelerator.device)
        with torch.random.fork_rng(devices), accelerator.no_sync(unet):
            losses, _ = objective(unet, batch)
            torch.autograd.grad(losses.mean(), first)
    if devices:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def random_batch(sample: Batch, bucket: Bucket, batch_size: int, generator: torch.Generator) -> Batch:
    """A Batch of `bucket`'s shape with random numbers in place of images and texts: products of zeros run faster."""

    def normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.dtype)

    latents = (batch_size, sample.latents.shape[1], bucket.height // 8, bucket.width // 8)
    repeated = {name: _repeated(getattr(sample, name), batch_size) for name in ("weight", "position", "item")}
    return replace(
        sample,
        **repeated,
        latents=normal(latents, sample.latents),
        noise=normal(latents, sample.noise),
        perturbation=torch.zeros(batch_size, 1, 1, 1),
        context=normal((batch_size, *sample.context.shape[1:]), sample.context),
        pooled=normal((batch_size, *sample.pooled.shape[1:]), sample.pooled),
        time_ids=_repeated(sample.time_ids, batch_size),
        u=torch.rand(batch_size, generator=generator, dtype=torch.float64),
    )


def _repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor[:1].expand(count, *tensor.shape[1:]).clone()
