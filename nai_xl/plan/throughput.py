"""How fast a step should be, from what it computes and moves and what a card can do: an expectation, no promise."""

from __future__ import annotations

from dataclasses import dataclass

from nai_xl.engine.gpus import Gpu
from nai_xl.plan.footprint import Footprint

UTILISATION = 0.33
"""Share of a card's dense bf16 peak that the executed FLOPs get: our own target of 16 images/s at 1024 on one H200."""
STREAMED = 0.8  # of the memory bandwidth that one pass over weights and state gets
COLLECTIVE = 0.8  # of a link's rate in one direction that NCCL's all-reduce gets
OVERLAPPED = 0.9  # of the backward pass: the last bucket of gradients has nothing left to hide behind
BACKWARD = 2 / 3  # of a step's FLOPs, without recomputation


@dataclass(frozen=True)
class Speed:
    """Seconds are those of one optimizer step."""

    compute: float
    update: float  # reading and writing weights, gradients, state and average
    all_reduce: float
    exposed: float  # part of all_reduce that no computation hides
    images: int  # of all devices

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.exposed

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def efficiency(self) -> float:
        """Against the same devices without communication."""
        return (self.compute + self.update) / self.seconds


def expected(
    footprint: Footprint,
    gpu: Gpu,
    *,
    batch: int,
    grad_accum: int = 1,
    gpus: int = 1,
    nodes: int = 1,
    utilisation: float = UTILISATION,
) -> Speed:
    """The speed of `gpus` devices in each of `nodes` machines."""
    compute = grad_accum * footprint.flops / (utilisation * gpu.bf16_tflops * 1e12)
    moved = 2 * footprint.weights + footprint.gradients + 2 * footprint.optimizer
    reduce = all_reduce_seconds(footprint.gradients, gpu, gpus=gpus, nodes=nodes)
    hidden = OVERLAPPED * BACKWARD * compute / grad_accum
    return Speed(
        compute=compute,
        update=moved / (STREAMED * gpu.bandwidth_gbs * 1e9),
        all_reduce=reduce,
        exposed=max(reduce - hidden, (1 - OVERLAPPED) * reduce),
        images=batch * grad_accum * gpus * nodes,
    )


def all_reduce_seconds(size: int, gpu: Gpu, *, gpus: int, nodes: int) -> float:
    """2 (n - 1) / n size / bandwidth: the ring's lower bound for n devices, on its slowest link.

    Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms (2009), equation 1; nccl-tests' doc/PERFORMANCE.md.
    Between machines every device's own network card carries its share, so they add up. What DistributedDataParallel
    hides behind the backward pass: Li et al., 2006.15704, section 3.2.3.
    """
    world = gpus * nodes
    inside = gpu.interconnect_gbs / 2
    slowest = inside if nodes == 1 else min(inside, gpu.network_gbs * gpus) if gpus > 1 else gpu.network_gbs
    return 2 * (world - 1) / world * size / (COLLECTIVE * slowest * 1e9)
