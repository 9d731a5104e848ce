"""What one optimizer step asks of the machine: torch operators by part, waits for the device, graphs, kernel launches.

python benchmarks/ops.py [--size tiny|sdxl] [--resolution N] [--batch N] [--graphs]

Operators are counted below autograd and autocast, as the device is asked for them (TorchDispatchMode); a fused or
foreach call is one, however many tensors it serves. size=sdxl runs the real loop on fake tensors: nothing is computed,
so a laptop counts the full model.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import (
    RESULTS,
    Bare,
    Row,
    Unread,
    command,
    random_batch,
    random_data,
    shapes,
    table,
    training,
    watched,
    write,
)
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from nai_xl.data.cache import MemoryCache
from nai_xl.engine.loop import train
from nai_xl.engine.stop import Stop
from nai_xl.interfaces import Bucket
from nai_xl.model.sdxl_random import random_unet
from nai_xl.model.tiny import tiny_sdxl

PARTS = ("forward", "backward", "update", "rest")
NAMES = {"module": "forward", "strategy.backward": "backward", "update": "update", "batches": "data"}
WAITS = frozenset(
    "_local_scalar_dense equal nonzero masked_select _unique2 unique_dim unique_consecutive is_nonzero item".split()
)
"""Operators whose result's value or shape the host must know: on a GPU it waits for all that was asked before."""
NATIVE = {"tiny": 128, "sdxl": 1024}


class Count(TorchDispatchMode):
    """Operators by part, and those that wait with the line that asked for them. What the loader does is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.work = "rest", 0
        self.ops: dict[str, Counter[str]] = {part: Counter() for part in (*PARTS, "data")}
        self.waits: Counter[str] = Counter()

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        """For common.watched: what runs inside the network, the backward pass or the update counts as theirs."""
        before = self.part
        self.part = NAMES.get(name, before) if before == "rest" else before
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))  # a fake tensor is asked for its device in this way
        self.ops[self.part][name] += 1
        self.work += self.part != "data" and not func.is_view
        by_mask = name.startswith("index") and any(_is_mask(index) for index in _indices(args))
        if name in WAITS or by_mask:
            self.wait(f"aten.{name}")
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return True  # a fake tensor has no value: let the step go on with 1
        return func(*args, **(kwargs or {}))

    def wait(self, what: str) -> None:
        if self.part != "data":
            self.waits[f"{what} at {_caller()}"] += 1

    def clear(self) -> None:
        self.work = 0
        for counter in (*self.ops.values(), self.waits):
            counter.clear()

    def totals(self) -> dict[str, int]:
        return {part: self.ops[part].total() for part in PARTS}


def _indices(args: Sequence[Any]) -> Sequence[Any]:
    return args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


class HostReads(TorchFunctionMode):
    """Tells `count` of every tensor that Python code brings to the host, which a CPU's operators do not show."""

    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "numpy", "tolist"):  # item and bool end in _local_scalar_dense, which is counted already
            self.count.wait(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost line outside torch, this file and its helper, with the file's last two path parts."""
    mine = (__file__, str(Path(__file__).with_name("common.py")))
    for frame in reversed(traceback.extract_stack()):
        if f"{Path(torch.__file__).parent}" not in frame.filename and frame.filename not in mine:
            return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
    return "torch"


def our_steps(size: str, resolution: int, batch: int, overrides: Sequence[str], steps: int) -> Count:
    """Operators of `steps` steps of our loop between two reports, after two that warm it up."""
    count, storage = Count(), _storage(size)
    with tempfile.TemporaryDirectory() as folder, _fakes_are_plain():
        with storage:
            unet = network(size)
        overrides = [*overrides, "ema=none", f"run.batch_size={batch}", "run.log_every=1000000"]
        shape = shapes(unet, resolution)
        data = random_data(shape, batch, MemoryCache())
        settings, parts = training(overrides, unet, data, Path(folder), storage=storage)
        parts = replace(parts, state=replace(parts.state, meter=Unread()))  # no report at the end of what is run here
        with storage, count:
            parts.batches = itertools.repeat(random_batch(shape, batch, parts.state.strategy.device))
            train(settings, parts, start=0, steps=2, stop=Stop())
            count.clear()
            with HostReads(count):
                train(settings, watched(parts, count.around), start=2, steps=2 + steps, stop=Stop())
    return count


def bare_steps(size: str, resolution: int, batch: int, precision: str, steps: int) -> Count:
    """The same of the bare loop."""
    count = Count()
    with _storage(size), _fakes_are_plain(), count:
        unet = network(size).to(DEVICE).train()
        bare = Bare(unet, torch.optim.AdamW(unet.parameters(), fused=True), DEVICE, precision)
        batches = itertools.repeat(random_batch(shapes(unet, resolution), batch, DEVICE))
        bare.steps(batches, 2)
        count.clear()
        bare.steps(batches, steps, count.around)
    return count


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(size: str) -> Any:
    if size == "tiny":
        return tiny_sdxl(seed=0).unet
    unet = random_unet(seed=0, device=DEVICE)
    unet.to = lambda *_, **__: unet  # it is in place, and torch cannot move fake parameters
    return unet


def _storage(size: str) -> AbstractContextManager[Any]:
    """Fake tensors for the full model. The run's own tables are real ones, hence allow_non_fake_inputs."""
    return nullcontext() if size == "tiny" else FakeTensorMode(allow_non_fake_inputs=True)


def _fakes_are_plain() -> AbstractContextManager[Any]:
    """torch clips plain tensors with a foreach call and all others one by one: fake ones are to be taken for plain."""
    return mock.patch.object(_foreach_utils, "_foreach_supported_types", [torch.Tensor, FakeTensor])


def row(arm: str, count: Count, steps: int) -> Row:
    """A step's operators, and its waits for the device."""
    totals = {part: number / steps for part, number in count.totals().items()}
    per_step = {part: int(n) if n == int(n) else n for part, n in {**totals, "all": sum(totals.values())}.items()}
    return {"arm": arm, **per_step, "less views": count.work // steps, "waits": count.waits.total() / steps}


def graphs(overrides: Sequence[str], buckets: Sequence[Bucket]) -> Row:
    """Graphs and graph breaks of our loop over canvases of several shapes, tiny model; torch._dynamo's counters."""
    torch._dynamo.reset()
    counters.clear()
    with tempfile.TemporaryDirectory() as folder:
        unet = network("tiny")
        shape = shapes(unet, NATIVE["tiny"])
        overrides = [*overrides, "ema=none", "run.batch_size=2", "run.log_every=1000000"]
        settings, parts = training(overrides, unet, random_data(shape, 2, MemoryCache()), Path(folder))
        device = parts.state.strategy.device
        parts.batches = iter([random_batch(shape, 2, device, canvas=bucket) for bucket in buckets])
        train(settings, parts, start=0, steps=len(buckets), stop=Stop())
    found = counters["stats"]
    breaks = sum(counters["graph_break"].values())
    return {
        "arm": " ".join(overrides[:-3]),
        "buckets": len(buckets),
        "graphs": found["unique_graphs"],
        "breaks": breaks,
    }


def kernel_launches(overrides: Sequence[str], steps: int) -> float:
    """Kernels a step that the host launches on a GPU, tiny model, by torch.profiler."""
    with tempfile.TemporaryDirectory() as folder:
        unet = network("tiny")
        shape = shapes(unet, NATIVE["tiny"])
        overrides = [*overrides, "ema=none", "run.batch_size=4", "run.log_every=1000000"]
        settings, parts = training(overrides, unet, random_data(shape, 4, MemoryCache()), Path(folder))
        parts.batches = itertools.repeat(random_batch(shape, 4, parts.state.strategy.device))
        train(settings, parts, start=0, steps=3, stop=Stop())
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            train(settings, parts, start=3, steps=3 + steps, stop=Stop())
    launches = [event.count for event in profile.key_averages() if event.key.startswith(("cudaLaunch", "cuLaunch"))]
    return sum(launches) / steps


PRECISIONS = {"fp32 or bf16 weights": [], "bf16 autocast": ["precision=bf16"]}
CHECKPOINTED = ["precision=bf16", "memory=[sdpa,gradient_checkpointing]"]
BUCKETS = [Bucket(*size) for size in ((128, 128), (96, 160), (160, 96), (128, 96), (96, 128), (192, 96), (96, 192))]


def main(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "sdxl"), default="tiny")
    parser.add_argument("--resolution", type=int, help="pixels; default: the model's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--graphs", action="store_true", help="compile, and count graphs too: minutes on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    resolution = args.resolution or NATIVE[args.size]
    asked = (args.size, resolution, args.batch)
    counts = {"bare, fp32 or bf16 weights": bare_steps(*asked, "no", args.steps)}
    counts["bare, bf16 autocast"] = bare_steps(*asked, "bf16", args.steps)
    for name, overrides in (*PRECISIONS.items(), ("bf16 autocast, checkpointed", CHECKPOINTED)):
        counts[f"ours, {name}"] = our_steps(*asked, overrides, args.steps)
    rows = [row(arm, count, args.steps) for arm, count in counts.items()]
    ours = counts["ours, fp32 or bf16 weights"]
    waits = [{"wait": what, "a step": number / args.steps} for what, number in ours.waits.most_common()]
    settings: dict[str, Any] = {"model": args.size, "resolution": resolution, "batch": args.batch, "steps": args.steps}
    if torch.cuda.is_available():
        settings["kernel launches a step (tiny, fp32)"] = kernel_launches([], 10)
    name = f"ops_{args.size}"
    write(name, command(), settings, rows, args.out)
    if waits:
        print("\n".join(["Waits of our loop:", "", *table(waits)]))
    found: list[Row] = []
    if args.graphs:
        found = [graphs(["memory=[sdpa,compile]"], BUCKETS)]
        write("graphs", command(), {"model": "tiny", "buckets": ", ".join(b.name for b in BUCKETS)}, found, args.out)
    return {"rows": rows, "waits": waits, "graphs": found, "counts": counts}


if __name__ == "__main__":
    main(sys.argv[1:])
