"""What a run measures: collected on the device, copied to the host once per report.

perf/images_per_second counts all processes, perf/tflops each device. perf/mfu is perf/tflops over the device's peak of
dense bf16 products, whatever precision the run has (PaLM, 2204.02311, appendix B). perf/data_wait is the share of the
time that the loop stood waiting for its next batch: on a GPU, which may still be busy meanwhile, a bound from above.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.profiler import record_function

from nai_xl.errors import UserError
from nai_xl.interfaces import Direction, Losses, MicroBatch

BANDS = 4
PAUSED = "nai_xl: paused"  # the mark in a profiler's trace of what is not the training
GIB = 1 << 30


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held at once since the process began: on a GPU in torch's tensors there, which is less than the
    driver shows by the allocator's reserve and the CUDA context; on a CPU the process's whole resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def bands(timesteps: int) -> list[int]:
    """The edges of the bands by which losses are reported: [0, ..., timesteps]."""
    return [timesteps * band // BANDS for band in range(BANDS + 1)]


class Meter:
    """Losses, timesteps and gradient norms since the last report. `gather` brings [n] of every rank to all of them.

    `flops` tells the FLOPs that training on one image takes, by height and width in pixels and tokens of the caption;
    it is asked once a shape and report. `peak_tflops` is the device's peak, None where it is not known.

    `better` has the direction of its metrics, as an evaluator's has (interfaces.Evaluator).
    """

    better: ClassVar[Mapping[str, Direction]] = {
        "train/loss": "lower",
        "perf/images_per_second": "higher",
        "perf/tflops": "higher",
        "perf/mfu": "higher",
        "perf/data_wait": "lower",
        "perf/peak_memory_gib": "lower",
    }
    equal_within: ClassVar[Mapping[str, str]] = {"train/loss": "2%", "perf/": "2%"}
    incomparable_over: ClassVar[Mapping[str, Sequence[str]]] = {  # what the loss is made of, and of which samples
        "train/loss": (
            "loss", "error", "schedule", "parameterization", "timesteps", "objective", "noise", "latents",
            "native.resolution", "bucketing", "data", "captions", "sample_weights",
        )
    }  # fmt: skip

    def __init__(
        self,
        timesteps: int,
        *,
        gather: Callable[[Tensor], Tensor],
        rank: int = 0,
        world: int = 1,
        refuse_gradients: bool = True,
        flops: Callable[[int, int, int], int] | None = None,
        peak_tflops: float | None = None,
    ):
        self.edges = bands(timesteps)
        self.gather, self.rank, self.world, self.refuse_gradients = gather, rank, world, refuse_gradients
        self.flops, self.peak_tflops = flops, peak_tflops
        self.clear()

    def clear(self) -> None:
        self.rows: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()
        self.shapes: Counter[tuple[int, int, int]] = Counter()  # short side, long side, tokens -> images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block is not the training's: evaluation and checkpoints."""
        began = time.perf_counter()
        with record_function(PAUSED):
            yield
        self.started += time.perf_counter() - began

    def add(self, losses: Losses, batch: MicroBatch, *, waited: float) -> None:
        """Take in one micro-batch, its losses on the device; `waited` seconds for its data."""
        values, axis = losses
        item = batch.item.to(values.device, torch.float64, non_blocking=True)
        self.rows.append(torch.stack([values.detach().double(), axis.double(), item]))
        self.images += len(batch)
        self.waited += waited
        if self.flops is not None:
            self.shapes[batch.canvas] += len(batch)

    def add_grad_norm(self, norm: Tensor) -> None:
        """The gradient's norm before clipping, a scalar on the device."""
        self.norms.append(norm.detach().reshape(1))

    def read(self, *, lr: float, clear: bool = True) -> dict[str, float]:
        """The means since the last report over all ranks; then, with `clear`, start anew.

        Raises UserError naming the images when a loss, or with `refuse_gradients` a gradient, was not finite.
        """
        device = self.rows[-1].device  # rows of before a resume lie on the CPU
        table = self.gather(torch.cat([row.to(device) for row in self.rows], dim=1).T.contiguous())
        norms = torch.cat([norm.to(device) for norm in self.norms])
        peaks = self.gather(torch.full((1,), peak_memory_gib(device), dtype=torch.float64, device=device))
        # the only copy from the device between two reports
        parts = [table.flatten(), norms.double(), peaks]
        rows, norms, peaks = torch.cat(parts).cpu().split([part.numel() for part in parts])
        losses, t, items = rows.view(-1, 3).T
        self._refuse(losses, items, norms)
        seconds = max(time.perf_counter() - self.started, 1e-9)
        finite = norms[norms.isfinite()]
        values = {
            "train/loss": losses.mean().item(),
            **self._bands(losses, t),
            "train/grad_norm": finite.mean().item() if len(finite) else math.inf,
            "train/lr": lr,
            "perf/images_per_second": self.images * self.world / seconds,
            "perf/data_wait": self.waited / seconds,
            "perf/peak_memory_gib": peaks.max().item(),
            **self._throughput(seconds),
        }
        if clear:
            self.clear()
        return values

    def _throughput(self, seconds: float) -> dict[str, float]:
        """TFLOP/s of this device over all images since the last report, and their share of its peak."""
        if self.flops is None:
            return {}
        with self.paused():  # counting takes its time at the first image of a shape
            flops = sum(images * self.flops(*shape) for shape, images in self.shapes.items())
        tflops = flops / seconds / 1e12
        return {"perf/tflops": tflops, **({"perf/mfu": tflops / self.peak_tflops} if self.peak_tflops else {})}

    def _bands(self, losses: Tensor, t: Tensor) -> dict[str, float]:
        values = {}
        for low, high in zip(self.edges, self.edges[1:], strict=False):
            inside = losses[(t >= low) & (t < high)]
            if len(inside):
                values[f"train/loss_band_{low}_{high}"] = inside.mean().item()
        return values

    def _refuse(self, losses: Tensor, items: Tensor, norms: Tensor) -> None:
        bad = sorted({int(i) for i in items[~losses.isfinite()]})
        if bad or (self.refuse_gradients and not norms.isfinite().all()):
            which = f"the loss of images number {bad[:8]} of the index" if bad else "the gradient"
            raise UserError(
                f"{which} is not finite. The weights were not changed, and the last checkpoint is intact. Start a new "
                "run with a lower optimizer.lr, or with precision=fp32."
            )

    def state_dict(self) -> dict[str, Any]:
        """Collective. The rows of all ranks since the last report, so that a resumed run reports the same means."""
        device = self.rows[-1].device if self.rows else torch.device("cpu")  # rows of before a resume lie on the CPU
        rows = [row.to(device).T.contiguous() for row in self.rows]
        return {"rows": [self.gather(row) for row in rows] if self.world > 1 else rows, "norms": [*self.norms]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        rows = state["rows"]
        if any(row.shape[0] % self.world for row in rows):  # of another number of processes
            rows = [torch.cat(rows)]
        for row in rows:
            per_rank = row.shape[0] // self.world
            self.rows.append(row[self.rank * per_rank : (self.rank + 1) * per_rank].T)
        self.norms = state["norms"]
