"""debug=profile: where the time of a few training steps goes, in one screen, and torch's trace of them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from rich.console import RenderableType
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function, schedule

from nai_xl.engine.meter import peak_memory_gib
from nai_xl.interfaces import MicroBatch, Tracker
from nai_xl.profiler.advice import Setup, advice
from nai_xl.profiler.page import Page
from nai_xl.profiler.trace import DATA, STEP, summarise

Steps = Annotated[int, Field(ge=0)]
SILENT = "6"  # Kineto's log level above which it says nothing; on a CPU it only tells that it starts and stops


class NoProfiler:
    """Watches nothing."""

    def __enter__(self) -> NoProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pass

    def watch(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
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

    def watch(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
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
