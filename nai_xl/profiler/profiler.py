"""debug=profile: where the time of a few training steps goes, in one screen, and torch's trace of them."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function, schedule

from nai_xl.engine.meter import peak_memory_gib
from nai_xl.interfaces import Samples, Tracker
from nai_xl.profiler.trace import COMMUNICATION, COMPUTE, DATA, HOST, IDLE, MEMORY, STEP, WAIT, Summary, summarise

Steps = Annotated[int, Field(ge=0)]
COSTLIEST = 10
ATTENTION = {"sdpa", "flash", "cudnn", "math", "attention_slicing"}  # memory actions that say how attention is computed
SILENT = "6"  # Kineto's log level above which it says nothing; on a CPU it only tells that it starts and stops


@dataclass(frozen=True)
class Setup:
    """What the run has chosen, so that no advice names what is there already."""

    batch_size: int
    grad_accum: int
    workers: int
    mixed_precision: str
    memory: tuple[str, ...]

    def memory_with(self, *actions: str) -> str:
        """The override that adds these memory actions, "" when all are chosen."""
        new = [action for action in actions if action not in self.memory]
        return f"'memory=[{','.join([*self.memory, *new])}]'" if new else ""


class NoProfiler:
    """Watches nothing."""

    def __enter__(self) -> NoProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pass

    def watch(self, batches: Iterable[Samples]) -> Iterator[Samples]:
        return iter(batches)

    def step(self, number: int) -> None:
        pass


class Profiler(NoProfiler):
    """Leaves `wait` optimizer steps alone, warms torch's profiler up for `warmup` and records `active`; then it writes
    the trace and a summary to `dir` and the tracker and is done, while the run goes on. `steps` are those that the run
    has left: a window that is too long for them is cut to fit.

    A step is the time from its first batch to the end of its report; checkpoints and evaluation are left out.
    """

    changes_weights: ClassVar[bool] = False

    def __init__(
        self,
        *,
        steps: int,
        dir: Path,
        device: torch.device,
        setup: Setup,
        show: Callable[[RenderableType], None],
        tracker: Tracker,
        wait: Steps = 2,
        warmup: Steps = 2,
        active: Annotated[int, Field(ge=1)] = 6,
    ):
        self.dir, self.device, self.setup, self.show, self.tracker = dir, device, setup, show, tracker
        wait, warmup = min(wait, steps // 4), min(warmup, steps // 4)
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", SILENT)
        window = schedule(wait=wait, warmup=warmup, active=max(1, min(active, steps - wait - warmup)), repeat=1)
        self.torch = profile(activities=activities, schedule=window, on_trace_ready=self._ready)
        self.done, self.images, self.number = False, 0, 0
        self.mark: record_function | None = None

    def __enter__(self) -> Profiler:
        self.torch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the window of a run that was stopped inside it; of one that failed nothing is told."""
        self.done |= kind is not None
        self.torch.stop()

    def watch(self, batches: Iterable[Samples]) -> Iterator[Samples]:
        """The same batches, with marks in the trace where a step begins and while it waits for them."""
        source = iter(batches)
        while not self.done:
            if self.mark is None:
                self.mark = record_function(STEP)
                self.mark.__enter__()
            with record_function(DATA):
                batch = next(source, None)
            if batch is None:
                return
            if self.torch.current_action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE):
                self.images += len(batch)
            yield batch
        yield from source

    def step(self, number: int) -> None:
        """Tell that optimizer step `number` has ended."""
        if self.done or self.mark is None:
            return
        # before the window and at its end, so that the device does in it what the host asks for in it
        if self.device.type == "cuda" and self.torch.current_action != ProfilerAction.RECORD:
            torch.cuda.synchronize(self.device)
        self.mark.__exit__(None, None, None)
        self.mark, self.number = None, number
        self.torch.step()

    def _ready(self, recorded: profile) -> None:
        """Write, log and show what torch has recorded, up to step `number`."""
        if self.done:
            return
        self.done = True
        if not self.images:  # stopped before the first step of the window
            return
        self.dir.mkdir(exist_ok=True)
        trace = self.dir / f"trace_step_{self.number:08d}.json.gz"
        recorded.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        summary = summarise(events)
        findings = advice(summary, self.setup, on_gpu=self.device.type == "cuda")
        page = Page(summary, findings, self.number, self.images, peak_memory_gib(self.device), trace)
        text = self.dir / f"summary_step_{self.number:08d}.txt"
        text.write_text(page.text(), encoding="utf-8")
        self.show(page.rendered())
        for path in (trace, text):
            self.tracker.artifact(path)


def advice(found: Summary, setup: Setup, *, on_gpu: bool) -> list[str]:
    """A sentence for everything that costs more than it should, naming the override that may mend it."""
    share, kind = found.bounds, _by_kind(found)
    bigger = f"run.batch_size={2 * setup.batch_size}"
    compiled = "compile" in setup.memory
    said = []
    if found.compiling:
        said.append("torch.compile was at work in these steps, so they are not typical: profile.wait=50 looks later.")
    if share[WAIT] > 0.05:
        workers = max(4, 2 * setup.workers)
        said.append(f"The step waits {share[WAIT]:.0%} of its time for data: run.workers={workers} loads beside it.")
    if on_gpu and not found.kernels:
        said.append("No kernel was recorded: this machine does not let torch's profiler look at its GPU.")
    if share.get(IDLE, 0) > 0.1:
        fewer = "" if compiled else f", {setup.memory_with('compile')} makes the kernels fewer and larger"
        said.append(
            f"The device stands still {share[IDLE]:.0%} of the time while the host launches {found.kernels:,.0f} "
            f"kernels a step: {bigger} gives each of them more to do{fewer}."
        )
    if share.get(HOST, 0) > 0.2 and not compiled:
        said.append(f"Python and torch's own bookkeeping take {share[HOST]:.0%}: {bigger} divides it by more images.")
    if found.waits.get("aten::is_nonzero", 0) >= 1:
        said.append("The loop waits for the device each step to see a finite gradient: optimizer.fused=true spares it.")
    if share[MEMORY] > 0.4 and not compiled:
        said.append(
            f"{share[MEMORY]:.0%} goes to memory-bound operators: {setup.memory_with('compile')} fuses neighbours "
            "into one."
        )
    if kind["softmax"] > 0.02 and not ATTENTION & {*setup.memory}:
        said.append(f"Attention is not fused (softmax {kind['softmax']:.0%}): {setup.memory_with('sdpa')} is.")
    if kind["optimizer"] > 0.15:
        said.append(
            f"The optimizer, the clip and the averages take {kind['optimizer']:.0%}: {bigger} or "
            f"run.grad_accum={2 * setup.grad_accum} updates once for twice the images."
        )
    if on_gpu:
        said += _advice_on_gpu(found, setup, kind)
    return said or [
        f"Nothing stands out: {share[COMPUTE]:.0%} is matrix products, convolutions and attention, as it should be."
    ]


def _advice_on_gpu(found: Summary, setup: Setup, kind: Mapping[str, float]) -> Iterator[str]:
    exact = setup.mixed_precision == "no" and "bf16_weights" not in setup.memory
    if exact and found.bounds[COMPUTE] > 0.4:
        yield (f"{found.bounds[COMPUTE]:.0%} goes to products in float32: precision=bf16 does them on tensor cores.")
    if kind["copies"] > 0.1 and not exact and "bf16_weights" not in setup.memory:
        without = setup.memory_with("bf16_weights")
        yield (
            f"Copies take {kind['copies']:.0%}, autocast's casts among them: {without} optimizer=adamw_bf16 "
            "precision=fp32 needs none."
        )
    if kind["copies"] > 0.1 and "channels_last" not in setup.memory:
        yield f"Copies take {kind['copies']:.0%}, changes of layout among them: {setup.memory_with('channels_last')}."
    if found.bounds[COMMUNICATION] > 0.15:
        yield (
            f"Processes exchange gradients for {found.bounds[COMMUNICATION]:.0%} of the time: "
            f"run.grad_accum={2 * setup.grad_accum} does it half as often."
        )


def _by_kind(found: Summary) -> Mapping[str, float]:
    kinds: dict[str, float] = defaultdict(float)
    for (_, kind), share in found.kinds.items():
        kinds[kind] += share
    return kinds


# --- one screen -------------------------------------------------------------------------------------------------------

WIDTH, BAR = 100, 20
COLOURS = {COMPUTE: "green", MEMORY: "yellow", COMMUNICATION: "magenta", IDLE: "red", HOST: "red", WAIT: "red"}
MEANS = {
    IDLE: "the device stands still, waiting for the host",
    HOST: "Python, autograd and views between operators",
    WAIT: "for the next batch",
}


@dataclass(frozen=True)
class Page:
    """A summary for people."""

    found: Summary
    findings: list[str]
    step: int  # the last one recorded
    images: int  # of this process, in all recorded steps
    peak_gib: float
    trace: Path

    def rendered(self) -> RenderableType:
        found = self.found
        first = self.step - found.steps + 1
        speed = self.images / (found.steps * found.seconds)
        heading = Text.assemble(
            (f"profile of steps {first} to {self.step}", "bold"),
            f"   {1000 * found.seconds:,.0f} ms a step, {speed:,.1f} images/s with the profiler on, "
            f"peak memory {self.peak_gib:.2f} GiB",
        )
        said = [Text(f"- {finding}") for finding in self.findings]
        trace = Text(f"trace, to be opened at https://ui.perfetto.dev: {self.trace}", style="dim", overflow="fold")
        gap = Text()
        return Group(
            heading, gap, self._shares(), gap, self._costs(), gap, Text(self._counts()), gap, *said, gap, trace
        )

    def _shares(self) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True, min_width=BAR)
        table.add_column(style="dim")
        for bound, share in self.found.bounds.items():
            if share or bound != COMMUNICATION:
                bar = Text("█" * round(BAR * share), style=COLOURS[bound])
                table.add_row(bound, f"{share:.1%}", bar, MEANS.get(bound) or self._kinds(bound))
        return table

    def _kinds(self, bound: str) -> str:
        shares = {kind: share for (of, kind), share in self.found.kinds.items() if of == bound}
        return ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items() if share >= 0.0005)

    def _costs(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("costliest operators", overflow="fold")
        for name in ("ms/step", "share", "calls/step"):
            table.add_column(name, justify="right", min_width=len(name))
        table.add_column("kind", min_width=len("communication"))
        for cost in self.found.costs[:COSTLIEST]:
            share = cost.ms / 1000 / self.found.seconds
            table.add_row(
                cost.name.removeprefix("aten::"),
                f"{cost.ms:,.2f}",
                f"{share:.1%}",
                f"{cost.calls:,.0f}",
                Text(cost.kind, COLOURS[cost.bound]),
            )
        return table

    def _counts(self) -> str:
        found = self.found
        parts = [f"{found.operators:,.0f} operators"]
        if found.kernels:
            parts.append(f"{found.kernels:,.0f} kernels")
        parts.append(f"{_places(found.reads)} item()" + _where(found.reads))
        if found.kernels:
            parts.append(f"{_places(found.waits)} waits of the host for the device" + _where(found.waits))
        return "a step: " + "; ".join(parts)

    def text(self) -> str:
        """Without colours."""
        with io.StringIO() as file:
            Console(file=file, width=WIDTH, highlight=False).print(self.rendered())
            return file.getvalue()


def _places(counts: Mapping[str, float]) -> str:
    return f"{sum(counts.values()):,.1f}".removesuffix(".0")


def _where(counts: Mapping[str, float]) -> str:
    return f" (most in {next(iter(counts)).removeprefix('aten::')})" if counts else ""
