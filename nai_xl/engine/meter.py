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

from nai_xl.engine.nonfinite import Fault, OnFault, Sample, refuse
from nai_xl.interfaces import Direction, Losses, MicroBatch

BANDS = 4
HISTORY = 200  # steps whose mean losses are kept
SEARCH = 40  # steps in a row that a loss scaler may take to find its scale: from 2^16 down to 2^-24
LEFT_OUT = torch.tensor([[0.0], [0.0], [-1.0], [-1.0]], dtype=torch.float64)  # a row that counts nowhere
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

    What is not finite is found by the next look: before a report and before a checkpoint. `on_fault` decides whether
    the run goes on. If so, those samples are left out of the means, and their steps counted as train/skipped_steps.
    `images_per_step`: of all ranks, to tell the step of a position.

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
        images_per_step: int = 1,
        on_fault: OnFault = refuse,
        flops: Callable[[int, int, int], int] | None = None,
        peak_tflops: float | None = None,
    ):
        self.edges = bands(timesteps)
        self.gather, self.rank, self.world, self.refuse_gradients = gather, rank, world, refuse_gradients
        self.images_per_step, self.on_fault = images_per_step, on_fault
        self.flops, self.peak_tflops = flops, peak_tflops
        self.left_out = 0  # steps of the whole run
        self.history: dict[int, float] = {}  # step -> mean of its finite losses
        self.finite_at: int | None = None  # the last step whose gradient was finite
        self.clear()

    def clear(self) -> None:
        self.rows: list[Tensor] = []  # [4,B] each: loss, axis, item, position
        self.norms: list[Tensor] = []
        self.steps: list[int] = []  # of the norms
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
        names = (name.to(values.device, torch.float64, non_blocking=True) for name in (batch.item, batch.position))
        self.rows.append(torch.stack([values.detach().double(), axis.double(), *names]))
        self.images += len(batch)
        self.waited += waited
        if self.flops is not None:
            self.shapes[batch.canvas] += len(batch)

    def add_grad_norm(self, norm: Tensor, step: int = 0) -> None:
        """The gradient's norm before clipping, a scalar on the device, of optimizer step `step`, counted from 1."""
        self.norms.append(norm.detach().reshape(1))
        self.steps.append(step)

    def look(self) -> tuple[Tensor, Tensor, float]:
        """Collective, and the one wait for the device: rows [n,4] of all ranks, norms, and peak memory in GiB.

        Hands what is not finite to `on_fault`, which may raise; what returns is finite, but for norms with fp16.
        """
        device = self.rows[-1].device  # rows of before a resume lie on the CPU
        table = self.gather(torch.cat([row.to(device) for row in self.rows], dim=1).T.contiguous())
        norms = torch.cat([torch.zeros(0, device=device), *(norm.to(device) for norm in self.norms)])
        peaks = self.gather(torch.full((1,), peak_memory_gib(device), dtype=torch.float64, device=device))
        parts = [table.flatten(), norms.double(), peaks]
        rows, norms, peaks = torch.cat(parts).cpu().split([part.numel() for part in parts])
        rows = rows.view(-1, len(LEFT_OUT))
        self._remember(rows)
        if fault := self._fault(rows, norms):
            self.on_fault(fault, self.left_out)
            self.left_out += len(fault.steps)
            self._leave_out()
            rows, norms = rows[rows[:, 0].isfinite()], norms[norms.isfinite()]
        return rows[rows[:, 2] >= 0], norms, peaks.max().item()

    def read(self, *, lr: float, clear: bool = True) -> dict[str, float]:
        """The means since the last report over all ranks; then, with `clear`, start anew."""
        rows, norms, peak = self.look()
        seconds = max(time.perf_counter() - self.started, 1e-9)
        finite = norms[norms.isfinite()]
        values = {
            **({"train/loss": rows[:, 0].mean().item()} if len(rows) else {}),
            **self._bands(rows[:, 0], rows[:, 1]),
            "train/grad_norm": finite.mean().item() if len(finite) else math.inf,
            "train/lr": lr,
            **({"train/skipped_steps": float(self.left_out)} if self.left_out else {}),
            "perf/images_per_second": self.images * self.world / seconds,
            "perf/data_wait": self.waited / seconds,
            "perf/peak_memory_gib": peak,
            **self._throughput(seconds),
        }
        if clear:
            self.clear()
        return values

    # --- what is not finite -------------------------------------------------------------------------------------------

    def _remember(self, rows: Tensor) -> None:
        """Take the mean of every step's finite losses into the history."""
        kept = rows[rows[:, 0].isfinite() & (rows[:, 3] >= 0)]
        for step in (steps := kept[:, 3] // self.images_per_step + 1).unique():
            self.history[int(step)] = kept[steps == step, 0].mean().item()
        for step in sorted(self.history)[:-HISTORY]:
            del self.history[step]

    def _fault(self, rows: Tensor, norms: Tensor) -> Fault | None:
        bad = rows[~rows[:, 0].isfinite()]
        bad = bad[bad[:, 3].argsort(stable=True)]
        samples = [Sample(int(position), int(item), axis) for _, axis, item, position in bad.tolist()]
        steps = {sample.position // self.images_per_step + 1 for sample in samples}
        known = list(zip(self.steps, norms.isfinite().tolist(), strict=True))
        if self.refuse_gradients:
            steps |= {step for step, finite in known if not finite}
        elif known:
            first = self.steps[0] - 1 if self.finite_at is None else self.finite_at
            self.finite_at = max([first, *(step for step, finite in known if finite)])
            if self.steps[-1] - self.finite_at > SEARCH:  # the scaler skips them and says nothing
                steps.add(self.steps[-1])
        return Fault(samples, sorted(steps), dict(self.history)) if steps else None

    def _leave_out(self) -> None:
        """Rows keep their number, which must be the same on all ranks."""
        self.rows = [torch.where(row[0].isfinite(), row, LEFT_OUT.to(row.device)) for row in self.rows]
        pairs = [pair for pair in zip(self.norms, self.steps, strict=True) if pair[0].isfinite()]
        self.norms, self.steps = [norm for norm, _ in pairs], [step for _, step in pairs]

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

    # --- saved state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Collective. The rows of all ranks since the last report, so that a resumed run reports the same means.

        They are looked at first, so that no checkpoint is written of a run that ends here.
        """
        if self.rows:
            self.look()
        device = self.rows[-1].device if self.rows else torch.device("cpu")  # rows of before a resume lie on the CPU
        rows = [row.to(device).T.contiguous() for row in self.rows]
        return {
            "rows": [self.gather(row) for row in rows] if self.world > 1 else rows,
            "norms": [*self.norms],
            "steps": [*self.steps],
            "left_out": self.left_out,
            "finite_at": self.finite_at,
            "history": [[step, loss] for step, loss in self.history.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Earlier versions saved rows without positions, and what was not finite: that is left out, and said."""
        self.clear()
        rows = state["rows"]
        if any(row.shape[0] % self.world for row in rows):  # of another number of processes
            rows = [torch.cat(rows)]
        for row in rows:
            per_rank = row.shape[0] // self.world
            mine = row[self.rank * per_rank : (self.rank + 1) * per_rank].T
            unknown = torch.full((len(LEFT_OUT) - len(mine), per_rank), -1.0, dtype=mine.dtype)
            self.rows.append(torch.cat([mine, unknown]))
        self.norms = state["norms"]
        self.steps = list(state.get("steps", [0] * len(self.norms)))
        self.left_out, self.finite_at = int(state.get("left_out", 0)), state.get("finite_at")
        self.history = {int(step): loss for step, loss in state.get("history", ())}
        if not all(row[0].isfinite().all() for row in self.rows) or (
            self.refuse_gradients and not all(norm.isfinite() for norm in self.norms)
        ):
            self._leave_out()
            if self.rank == 0:
                told = "the checkpoint holds losses that are not finite: they are left out of the report"
                print(told, file=sys.stderr)
